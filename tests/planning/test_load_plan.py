"""Simulated loads: data files made by the save plan are read by the load plan into boxes that know nothing of it."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdcp.boxes import Box, whole
from asyncdcp.metadata import (
    ChunkLocation,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from asyncdcp.planning import ChunkSpec, LoadPlan, Structure, TensorSpec, Want, load_plan, plan_load, plan_save
from tests.pipeline.forge import ArrayTarget, images_of, parts_of, steady

Array = np.ndarray[Any, Any]


def stored(array: Array, boxes: list[Box], file_limit: int = 1 << 40) -> tuple[Metadata, dict[str, bytes]]:
    """``array`` saved in the given chunks: what a reader would make of it, and the files."""
    structure = Structure(
        (TensorSpec("w", array.dtype.name, array.shape),), tuple(ChunkSpec(0, b) for b in boxes), {}, 0
    )
    plan = plan_save(structure, file_limit=file_limit)
    files = {f"f{n}": bytes(image) for n, image in enumerate(images_of(plan, parts_of(plan, {"w": array})))}
    places = {}
    for n, image in enumerate(plan.images):
        for chunk, begin in zip(image.chunks, image.begins, strict=True):
            box = plan.chunks[chunk].box
            if box.volume:
                places[MetadataIndex("w", box.offsets)] = ChunkLocation(f"f{n}", begin, box.volume * array.itemsize)
    chunks = tuple(ChunkStorageMetadata(*chunk.box) for chunk in plan.chunks if chunk.box.volume)
    tensor = TensorStorageMetadata(TensorProperties(array.dtype.name), array.shape, chunks)
    return Metadata({"w": tensor}, places, StorageMeta("", "", 1, 0.0, {}), {}, None, {}), files  # type: ignore[arg-type]  # no tree


def run(plan: LoadPlan, files: dict[str, bytes], dtype: str) -> list[Array]:
    targets = [ArrayTarget(want.box, dtype) for want in plan.wants]
    for item in plan.items:
        target, data = targets[item.want], memoryview(files[item.file])[item.begin : item.end]
        if item.target >= 0:
            assert target.buffer is not None
            target.buffer[item.target : item.target + len(data)] = data
        else:
            target.deliver(item.chunk, item.start, data)
    return [target.array for target in targets]


@st.composite
def cut(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Chunks that tile a shape, as meshes shard them: by cuts that go through each dimension."""
    boxes = [Box((), ())]
    for size in shape:
        edges = [0, *sorted(draw(st.lists(st.integers(0, size), max_size=2))), size]
        boxes = [
            Box((*box.offsets, start), (*box.sizes, end - start)) for box in boxes for start, end in pairwise(edges)
        ]
    return draw(st.permutations([box for box in boxes if box.volume] or [whole(shape)]))


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    starts = [draw(st.integers(0, size)) for size in shape]
    return Box(
        tuple(starts), tuple(draw(st.integers(0, size - start)) for size, start in zip(shape, starts, strict=True))
    )


@steady
@given(st.lists(st.integers(0, 6), max_size=3).map(tuple), st.sampled_from(["int8", "float32"]), st.data())
def test_any_box_comes_back_from_any_chunks(shape: tuple[int, ...], dtype: str, data: st.DataObject) -> None:
    array = np.arange(prod(shape), dtype=dtype).reshape(shape)
    metadata, files = stored(array, data.draw(cut(shape)), file_limit=data.draw(st.sampled_from([7, 64, 1 << 30])))
    wants = [Want("w", box) for box in data.draw(st.lists(boxes_in(shape), max_size=3))] + [Want("w", whole(shape))]
    block = data.draw(st.sampled_from([1, 4, 16, 1 << 20]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_plan, "BLOCK_BYTES", block)
        plan = plan_load(metadata, wants)
    for want, got in zip(wants, run(plan, files, dtype), strict=True):
        picked = tuple(slice(a, a + n) for a, n in zip(want.box.offsets, want.box.sizes, strict=True))
        assert np.array_equal(got, array[picked])
    assert list(plan.items) == sorted(plan.items, key=lambda item: (item.file, item.begin))
    assert plan.read_bytes == sum(item.end - item.begin for item in plan.items)


def plan_of(shape: tuple[int, ...], want: Box) -> LoadPlan:
    """Of one whole chunk of bytes, with blocks of 64 bytes; no data is made."""
    chunk = ChunkStorageMetadata(*whole(shape))
    tensor = TensorStorageMetadata(TensorProperties("int8"), shape, (chunk,))
    places = {MetadataIndex("w", chunk.offsets): ChunkLocation("f", 4096, prod(shape))}
    metadata = Metadata({"w": tensor}, places, StorageMeta("", "", 1, 0.0, {}), {}, None, {})  # type: ignore[arg-type]  # no tree
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_plan, "BLOCK_BYTES", 64)
        return plan_load(metadata, [Want("w", want)])


@pytest.mark.parametrize(
    ("shape", "want", "items", "read"),
    [
        ((100, 100), whole((100, 100)), 1, 10_000),
        ((100, 100), Box((10, 0), (5, 100)), 1, 500),  # rows are one run
        ((100, 100), Box((0, 0), (100, 80)), 100, 8_000),  # long runs are read straight to their place
        ((100, 100), Box((0, 0), (100, 50)), 1, 9_950),  # short runs, short gaps: as a whole
        ((100, 100), Box((0, 5), (100, 10)), 100, 1_000),  # short runs far apart
        ((10, 10, 10), Box((0, 0, 0), (10, 1, 9)), 10, 90),  # rows of a plane, planes far apart
        ((10, 10, 10), Box((0, 0, 0), (10, 9, 9)), 10, 890),  # planes of a block and more
        ((1, 10, 100), Box((0, 0, 0), (1, 10, 1)), 10, 10),
    ],
)
def test_what_is_read_for_a_box(shape: tuple[int, ...], want: Box, items: int, read: int) -> None:
    plan = plan_of(shape, want)
    assert (len(plan.items), plan.read_bytes) == (items, read)


def test_direct_where_consecutive_on_both_sides() -> None:
    assert [item.target for item in plan_of((100, 100), Box((3, 0), (2, 100))).items] == [0]
    assert [item.target for item in plan_of((100, 100), Box((3, 20), (2, 70))).items] == [0, 70]
    assert [item.target for item in plan_of((100, 100), Box((3, 20), (2, 50))).items] == [-1]
