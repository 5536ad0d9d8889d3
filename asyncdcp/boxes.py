"""Boxes: axis-aligned n-dimensional intervals of integers, by which chunks, shards and targets are compared.

A box is ``(offsets, sizes)``, two tuples of one length; zero-dimensional boxes hold exactly one point, and a box with
a zero size holds none. Pure arithmetic, row-major where an order of elements matters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from math import prod
from random import Random
from secrets import randbits
from typing import NamedTuple

_PRIME = (1 << 61) - 1


class Box(NamedTuple):
    """``offsets`` and ``sizes`` per dimension; covers ``offsets[d] <= i < offsets[d] + sizes[d]``."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def volume(self) -> int:
        """The number of points; 1 for a zero-dimensional box."""
        return prod(self.sizes)


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor of ``shape``; the same object for the same shape, of which most states have few."""
    return _whole(tuple(shape))


@lru_cache(1024)
def _whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


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


def tiles(target: Box, boxes: Iterable[Box]) -> bool:
    """Whether every point of ``target`` lies in exactly one of ``boxes``, and no other point in any.

    In O(boxes * dimensions), however the boxes lie. A box is a product over its dimensions: a step up at its start, a
    step down at its end. With a variable for each coordinate of each dimension that is a polynomial, and the boxes tile
    the target exactly if their polynomials add up to its own. The sums are compared at one random point modulo a prime
    (Schwartz-Zippel), so no input can be made to be taken wrongly: the chance is below dimensions / 2 ** 61.
    """
    draw = Random(randbits(128))
    points = [defaultdict[int, int](lambda: draw.randrange(_PRIME)) for _ in target.sizes]

    def value(box: Box) -> int:
        product = 1
        for point, start, size in zip(points, box.offsets, box.sizes, strict=True):
            product = product * (point[start] - point[start + size]) % _PRIME
        return product

    return (sum(map(value, boxes)) - value(target)) % _PRIME == 0


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
