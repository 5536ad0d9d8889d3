"""Chunks as columns give the answers that boxes one by one do."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from asyncdcp.boxes import Box, intersect, tiles, whole
from asyncdcp.chunk_table import ChunkTable, StoredTensor, chunk_rows, listing_of
from asyncdcp.metadata import BytesStorageMetadata, ChunkColumns, IndexPlan, MetadataIndex, WrittenColumns
from asyncdcp.stored_chunks import StoredChunks, StoredTensors


@dataclass
class Case:
    """Tensors of these shapes, and the chunks that each rank has of them."""

    shapes: list[tuple[int, ...]]
    ranks: list[list[tuple[int, Box]]]


def columns(chunks: list[tuple[int, Box]]) -> ChunkColumns:
    return ChunkColumns(
        [tensor for tensor, _ in chunks],
        [offset for _, box in chunks for offset in box.offsets],
        [size for _, box in chunks for size in box.sizes],
    )


def plan(shapes: list[tuple[int, ...]]) -> IndexPlan:
    names = [f"t{n}" for n in range(len(shapes))]
    return IndexPlan(names, ["int16"] * len(shapes), shapes, {}, WrittenColumns([], [], [], [], []), [], b"{}")  # type: ignore[arg-type]  # the tree is not looked at


def table(case: Case) -> ChunkTable:
    listing = listing_of(plan(case.shapes))
    parts = []
    for rank, chunks in enumerate(case.ranks):
        rows = chunk_rows(columns(chunks), listing)
        assert rows is not None
        filled = rows.length > 0
        rows = rows.only(filled, listing.ndims[rows.tensor])
        begins = np.arange(filled.size)[filled]
        parts.append((rows, np.full(begins.size, rank), begins))
    tensors = [StoredTensor(f"t{n}", "index", "int16", shape) for n, shape in enumerate(case.shapes)]
    return ChunkTable(tensors, [f"file {rank}" for rank in range(len(case.ranks))], parts)


@st.composite
def cuts(draw: st.DrawFn, extent: int) -> list[tuple[int, int]]:
    borders = sorted({0, extent, *draw(st.lists(st.integers(0, extent), max_size=3))})
    return list(pairwise(borders)) or [(0, 0)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Mostly tilings, of which chunks are repeated, left out, or added."""
    shapes = draw(st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4))
    chunks: list[tuple[int, Box]] = []
    for number, shape in enumerate(shapes):
        for runs in product(*(draw(cuts(extent)) for extent in shape)):
            box = Box(tuple(a for a, _ in runs), tuple(b - a for a, b in runs))
            chunks += [(number, box)] * draw(st.sampled_from([1, 1, 1, 1, 1, 1, 2, 0]))
        if draw(st.sampled_from([False] * 5 + [True])):
            ends = [draw(st.tuples(*[st.integers(0, extent)] * 2)) for extent in shape]
            chunks.append((number, Box(tuple(map(min, ends)), tuple(abs(a - b) for a, b in ends))))
    chunks = draw(st.permutations(chunks))
    world = draw(st.integers(1, 3))
    ranks: list[list[tuple[int, Box]]] = [[] for _ in range(world)]
    for chunk in chunks:
        ranks[draw(st.integers(0, world - 1))].append(chunk)
    return Case(shapes, ranks)


@given(cases(), st.data())
def test_the_table_says_what_boxes_say(case: Case, data: st.DataObject) -> None:
    made = table(case)
    fault = made.fault()
    first: list[dict[Box, tuple[int, int]]] = [{} for _ in case.shapes]
    for rank, chunks in enumerate(case.ranks):
        for place, (tensor, box) in enumerate(chunks):
            if box.volume:
                first[tensor].setdefault(box, (rank, place))
    wrong = [n for n, shape in enumerate(case.shapes) if not tiles(whole(shape), first[n])]
    assert (fault is None) == (not wrong)
    if fault is not None:
        assert fault[0] == wrong[0]
        return
    stored, places = StoredTensors(made, {"v": BytesStorageMetadata(3)}), StoredChunks(made)
    assert list(stored) == [*(f"t{n}" for n in range(len(case.shapes))), "v"]
    assert len(places) == len(list(places)) == sum(map(len, first))
    for number, shape in enumerate(case.shapes):
        name, expected = f"t{number}", first[number]
        chunks_of = stored[name].chunks  # type: ignore[union-attr]  # it is a tensor
        assert {Box(chunk.offsets, chunk.sizes) for chunk in chunks_of} == set(expected)
        for box, (rank, place) in expected.items():
            location = places[MetadataIndex(name, box.offsets)]
            assert (location.file, location.begin, location.length) == (f"file {rank}", place, 2 * box.volume)
        ends = [data.draw(st.tuples(*[st.integers(0, extent)] * 2)) for extent in shape]
        wanted = Box(tuple(map(min, ends)), tuple(abs(a - b) for a, b in ends))
        met = {box for box, _ in places.meeting(name, wanted)}
        assert met == {box for box in expected if intersect(box, wanted)}


@given(cases(), st.data())
def test_a_number_that_cannot_be_is_found(case: Case, data: st.DataObject) -> None:
    listing = listing_of(plan(case.shapes))
    chunks = [chunk for rank in case.ranks for chunk in rank]
    given_ = columns(chunks)
    changed = data.draw(st.sampled_from(["tensor", "offsets", "sizes"]))
    values: list[int] = getattr(given_, changed)
    if not values:
        return
    values[data.draw(st.integers(0, len(values) - 1))] = data.draw(st.sampled_from([-1, 7, 1 << 62, 1 << 63, 1 << 70]))
    assert chunk_rows(given_, listing) is None
