"""Who writes what: each row of each chunk is written by exactly one of its holders, and replicas weigh on all alike."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdcp.boxes import Box, intersect, tiles, whole
from asyncdcp.errors import ReplicaMismatch
from asyncdcp.planning import ChunkSpec, Structure, TensorSpec
from asyncdcp.planning.division import Division, divide, share
from asyncdcp.planning.held_chunks import holdings_of


def structure(rank: int, shapes: list[tuple[int, ...]], kinds: list[str], world_size: int) -> Structure:
    """What a rank holds: of a "sharded" tensor its rows, of a "replica" all, of one "lowest" may write all, too."""
    both = list(enumerate(zip(kinds, shapes, strict=True)))
    specs = tuple(TensorSpec(f"{kind}{number}", "float32", shape) for number, (kind, shape) in both)
    chunks = []
    for number, (kind, shape) in both:
        box = whole(shape)
        if kind == "sharded" and shape:
            size = -(-shape[0] // world_size)
            begin, end = min(rank * size, shape[0]), min((rank + 1) * size, shape[0])
            box = Box((begin, *(0,) * (len(shape) - 1)), (end - begin, *shape[1:]))
        if box.volume:
            chunks.append(ChunkSpec(number, box))
    return Structure(specs, tuple(chunks), {}, {}, rank=rank)


@st.composite
def jobs(draw: st.DrawFn) -> tuple[int, list[tuple[int, ...]], list[str]]:
    shapes = draw(st.lists(st.lists(st.integers(0, 300), max_size=2).map(tuple), min_size=1, max_size=6))
    kind = st.sampled_from(["sharded", "replica", "lowest"])
    kinds = draw(st.lists(kind, min_size=len(shapes), max_size=len(shapes)))
    return draw(st.integers(1, 5)), shapes, kinds


@given(jobs())
def test_every_element_is_written_once(job: tuple[int, list[tuple[int, ...]], list[str]]) -> None:
    world_size, shapes, kinds = job
    held = [structure(rank, shapes, kinds, world_size) for rank in range(world_size)]
    told = [
        holdings_of(each, lambda name: not name.startswith("lowest"), [b""] * len(each.chunks), {}) for each in held
    ]
    shares = divide(told)
    written: dict[int, list[Box]] = {number: [] for number in range(len(shapes))}
    for rank, each in enumerate(held):
        division = Division(told[rank], shares.rows[rank])
        mine = share(each, division.picks(each), rank)
        for tensor, box in mine.chunks:
            assert any(chunk.tensor == tensor and _within(box, chunk.box) for chunk in each.chunks)
            assert kinds[tensor] != "lowest" or rank == 0
            written[tensor].append(box)
    for number, shape in enumerate(shapes):
        assert tiles(whole(shape), written[number])


def _within(box: Box, outer: Box) -> bool:
    return intersect(box, outer) == box


@pytest.mark.parametrize("world_size", [2, 7, 64])
def test_replicas_weigh_alike_whatever_their_sizes(world_size: int) -> None:
    shapes: list[tuple[int, ...]] = [(50_000, 768), *[(768, 3072)] * 24, *[(768,)] * 50]
    held = [structure(rank, shapes, ["replica"] * len(shapes), world_size) for rank in range(world_size)]
    told = [holdings_of(each, lambda _: True, [b""] * len(each.chunks), {}) for each in held]
    loads: Counter[int] = Counter()
    for rank, rows in enumerate(divide(told).rows):
        for chunk, parts in zip(held[rank].chunks, rows, strict=True):
            inner = chunk.box.volume // chunk.box.sizes[0]
            loads[rank] += sum(end - begin for begin, end in parts) * inner
    assert max(loads.values()) <= 1.1 * sum(loads.values()) / world_size


def test_what_is_new_on_a_rank_it_writes_whole() -> None:
    held = structure(1, [(4, 4)], ["replica"], 2)
    told = [holdings_of(held, lambda _: True, [b""], {}) for _ in range(2)]
    division = Division(told[1], divide(told).rows[1])
    grown = structure(1, [(4, 4), (2,)], ["replica", "replica"], 2)
    changed = structure(1, [(4, 5)], ["replica"], 2)
    assert [pick.box for pick in division.picks(grown)][-1] == whole((2,))
    assert [pick.box for pick in division.picks(changed)] == [whole((4, 5))]


def test_all_that_differs_is_named() -> None:
    one, two = structure(0, [(4,), (2,)], ["replica"] * 2, 1), structure(0, [(4,), (3,)], ["replica"] * 2, 1)
    told = [
        holdings_of(one, lambda _: True, [b"a", b"c"], {}),
        holdings_of(two, lambda _: True, [b"b", b"c"], {}),
    ]
    with pytest.raises(ReplicaMismatch) as caught:
        divide(told)
    assert caught.value.tensors == ("replica1", "replica0")
