from __future__ import annotations

from itertools import product
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdcp.boxes import Box, contains, intersect, row_major_boxes, tiles, whole
from tests.pipeline.forge import steady

Point = tuple[int, ...]


def points(box: Box) -> set[Point]:
    return set(product(*(range(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))))


def boxes(ndim: int) -> st.SearchStrategy[Box]:
    axis = st.tuples(st.integers(0, 4), st.integers(0, 3))
    return st.lists(axis, min_size=ndim, max_size=ndim).map(
        lambda axes: Box(tuple(start for start, _ in axes), tuple(size for _, size in axes))
    )


pairs = st.integers(0, 3).flatmap(lambda ndim: st.tuples(boxes(ndim), boxes(ndim)))


@steady
@given(pairs)
def test_intersect(pair: tuple[Box, Box]) -> None:
    a, b = pair
    common = intersect(a, b)
    assert (points(common) if common else set()) == points(a) & points(b)
    assert a.volume == len(points(a))


@steady
@given(pairs)
def test_contains(pair: tuple[Box, Box]) -> None:
    outer, inner = pair
    if inner.volume:
        assert contains(outer, inner) == (points(inner) <= points(outer))
    elif contains(outer, inner):
        assert all(
            o <= i and i + size <= o + extent
            for o, extent, i, size in zip(outer.offsets, outer.sizes, inner.offsets, inner.sizes, strict=True)
        )


@st.composite
def partitions(draw: st.DrawFn) -> tuple[Box, list[Box]]:
    """A box and random cuts of it: some along all of it, as shards have them, and some of single pieces."""
    target = draw(st.integers(0, 3).flatmap(boxes))
    pieces = [target]
    for _ in range(draw(st.integers(0, 6)) if target.sizes else 0):
        n, dim = draw(st.integers(0, len(pieces) - 1)), draw(st.integers(0, len(target.sizes) - 1))
        offsets, sizes = pieces.pop(n)
        cut = draw(st.integers(0, sizes[dim]))
        pieces.append(Box(offsets, (*sizes[:dim], cut, *sizes[dim + 1 :])))
        moved = (*offsets[:dim], offsets[dim] + cut, *offsets[dim + 1 :])
        pieces.append(Box(moved, (*sizes[:dim], sizes[dim] - cut, *sizes[dim + 1 :])))
    return target, draw(st.permutations(pieces))


@steady
@given(partitions())
def test_a_partition_tiles_its_box(partition: tuple[Box, list[Box]]) -> None:
    assert tiles(*partition)


@steady
@given(partitions(), st.data())
def test_tiles_if_every_point_is_in_one_box(partition: tuple[Box, list[Box]], data: st.DataObject) -> None:
    """Against counting, with a box or two changed, so that holes and overlaps are often of equal size."""
    target, pieces = partition
    changed = list(pieces)
    for _ in range(data.draw(st.integers(1, 2))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(boxes(len(target.sizes)))
    held = sorted(point for box in changed for point in points(box))
    assert tiles(target, changed) == (held == sorted(points(target)))


def test_tiles_is_quick_where_boxes_lie_entangled() -> None:
    """Nested rings around a centre, and many dimensions: no order of cuts takes these apart."""
    rings = []
    for n in range(10_000):
        size = 20_001 - 2 * n
        rings += [Box((n, n), (1, size - 1)), Box((n, n + size - 1), (size - 1, 1))]
        rings += [Box((n + size - 1, n + 1), (1, size - 1)), Box((n + 1, n), (size - 1, 1))]
    assert tiles(whole((20_001, 20_001)), [*rings, Box((10_000, 10_000), (1, 1))])
    assert not tiles(whole((20_001, 20_001)), rings)
    stairs = [Box((0,) * k + (1,) + (0,) * (63 - k), (1,) * (k + 1) + (2,) * (63 - k)) for k in range(64)]
    assert tiles(whole((2,) * 64), [*stairs, Box((0,) * 64, (1,) * 64)])
    assert not tiles(whole((2,) * 64), stairs)


@steady
@given(st.lists(st.integers(0, 4), max_size=4), st.data())
def test_row_major_boxes(shape: list[int], data: st.DataObject) -> None:
    count = prod(shape)
    begin = data.draw(st.integers(0, count))
    end = data.draw(st.integers(begin, count))
    everything = list(product(*map(range, shape)))
    cut = list(row_major_boxes(shape, begin, end))
    assert [point for _, box in cut for point in sorted(points(box))] == everything[begin:end]
    assert all(everything[first] == box.offsets for first, box in cut)
    assert len(cut) <= max(2 * len(shape) - 1, 1)


def test_boxes_of_different_dimensions_do_not_meet() -> None:
    with pytest.raises(ValueError):
        intersect(whole((1,)), whole((1, 1)))
