"""Boxes: axis-aligned n-dimensional intervals of integers, by which chunks, shards and targets are compared.

A box is ``(offsets, sizes)``, two tuples of one length; zero-dimensional boxes hold exactly one point, and a box with
a zero size holds none. Pure arithmetic, row-major where an order of elements matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple


class Box(NamedTuple):
    """``offsets`` and ``sizes`` per dimension; covers ``offsets[d] <= i < offsets[d] + sizes[d]``."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def volume(self) -> int:
        """The number of points; 1 for a zero-dimensional box."""
        return prod(self.sizes)


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor of ``shape``."""
    return Box((0,) * len(shape), tuple(shape))


def intersect(a: Box, b: Box) -> Box | None:
    """The points that ``a`` and ``b`` share; None where there are none."""
    offsets, sizes = [], []
    for a_start, a_size, b_start, b_size in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True):
        start = max(a_start, b_start)
        size = min(a_start + a_size, b_start + b_size) - start
        if size <= 0:
            return None
        offsets.append(start)
        sizes.append(size)
    return Box(tuple(offsets), tuple(sizes))


def contains(outer: Box, inner: Box) -> bool:
    """Whether every point of ``inner`` lies in ``outer``; an empty ``inner`` must still lie within its bounds."""
    return all(
        o_start <= i_start and i_start + i_size <= o_start + o_size
        for o_start, o_size, i_start, i_size in zip(outer.offsets, outer.sizes, inner.offsets, inner.sizes, strict=True)
    )


def covers(target: Box, boxes: Sequence[Box]) -> bool:
    """Whether the union of ``boxes`` holds every point of ``target``. Boxes may overlap.

    What is left of the target is cut by one box after another, so n disjoint boxes cost O(n) cuts where each box
    meets few of the pieces that are left, as the shards of a tensor do.
    """
    rest = [] if target.volume == 0 else [target]
    for box in boxes:
        if not rest:
            break
        rest = [piece for old in rest for piece in subtract(old, box)]
    return not rest


def subtract(a: Box, b: Box) -> list[Box]:
    """``a`` without the points of ``b``, as disjoint boxes (at most two per dimension)."""
    common = intersect(a, b)
    if common is None:
        return [a]
    pieces = []
    offsets, sizes = list(a.offsets), list(a.sizes)
    for dim, (start, size) in enumerate(zip(common.offsets, common.sizes, strict=True)):
        before, after = start - offsets[dim], offsets[dim] + sizes[dim] - (start + size)
        for piece_start, piece_size in ((offsets[dim], before), (start + size, after)):
            if piece_size > 0:
                pieces.append(
                    Box(
                        (*offsets[:dim], piece_start, *offsets[dim + 1 :]),
                        (*sizes[:dim], piece_size, *sizes[dim + 1 :]),
                    )
                )
        offsets[dim], sizes[dim] = start, size
    return pieces


def overlapping(boxes: Sequence[Box]) -> tuple[int, int] | None:
    """The numbers of two boxes that share a point, or None. Sorts by the first dimension, so shards cost O(n log n)."""
    order = sorted((n for n in range(len(boxes)) if boxes[n].volume), key=lambda n: boxes[n].offsets)
    active: list[int] = []
    for n in order:
        box = boxes[n]
        start = box.offsets[0] if box.offsets else 0
        active = [m for m in active if not boxes[m].offsets or boxes[m].offsets[0] + boxes[m].sizes[0] > start]
        for m in active:
            if intersect(boxes[m], box) is not None:
                return m, n
        active.append(n)
    return None


def row_major_boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[tuple[int, Box]]:
    """Cuts the row-major elements ``begin <= i < end`` of a tensor of ``shape`` into boxes, in order.

    Yields ``(first element, box)``; the elements of each box are consecutive in row-major order, so a flat run of
    memory can be copied to or from a strided tensor box by box. At most ``2 * ndim - 1`` boxes.
    """
    if begin >= end:
        return
    if not shape:
        yield 0, Box((), ())
        return
    inner = prod(shape[1:])
    if inner == 0:
        return
    row, column = divmod(begin, inner)
    last_row, last_column = divmod(end, inner)
    if column or last_row == row:
        stop = min(inner, column + end - begin)
        for first, box in row_major_boxes(shape[1:], column, stop):
            yield row * inner + first, Box((row, *box.offsets), (1, *box.sizes))
        row += 1
    if row < last_row:
        sizes = (last_row - row, *shape[1:])
        yield row * inner, Box((row, *(0,) * (len(shape) - 1)), sizes)
    if last_column and row <= last_row:
        for first, box in row_major_boxes(shape[1:], 0, last_column):
            yield last_row * inner + first, Box((last_row, *box.offsets), (1, *box.sizes))
