"""Rectangles of given areas that fill a rectangle, as near to squares as they get. Pure.

The algorithm is that of Bruls, Huizing and van Wijk, "Squarified Treemaps" (2000): rows are laid along the shorter
side, and a row takes one more as long as its worst proportions do not get worse by that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Rectangle(NamedTuple):
    """Its upper left corner, width and height."""

    x: float
    y: float
    width: float
    height: float

    def inset(self, margin: float, top: float = 0.0) -> Rectangle:
        """What is left inside a margin, and a strip at the top; never negative."""
        width, height = max(0.0, self.width - 2 * margin), max(0.0, self.height - 2 * margin - top)
        return Rectangle(self.x + margin, self.y + margin + top, width, height)


def squarified(sizes: Sequence[float], area: Rectangle) -> list[Rectangle]:
    """A rectangle for each size, in proportion; sizes are positive and fall. Together they fill ``area``."""
    total = sum(sizes)
    if not sizes or not total or not area.width or not area.height:
        return [Rectangle(area.x, area.y, 0.0, 0.0)] * len(sizes)
    scale = area.width * area.height / total
    left, result = [size * scale for size in sizes], list[Rectangle]()
    while left:
        side = min(area.width, area.height)
        count = 1
        while count < len(left) and _worst(left[: count + 1], side) <= _worst(left[:count], side):
            count += 1
        row, left = left[:count], left[count:]
        placed, area = _laid(row, area)
        result += placed
    return result


def _worst(row: Sequence[float], side: float) -> float:
    """The worst proportion of a row along a side."""
    total = sum(row)
    return max(side * side * max(row) / (total * total), total * total / (side * side * min(row))) if side else 0.0


def _laid(row: Sequence[float], area: Rectangle) -> tuple[list[Rectangle], Rectangle]:
    """A row along the shorter side, and the area that is left."""
    total, placed = sum(row), []
    if area.width >= area.height:
        width, y = (total / area.height if area.height else 0.0), area.y
        for size in row:
            height = size / width if width else 0.0
            placed.append(Rectangle(area.x, y, width, height))
            y += height
        return placed, Rectangle(area.x + width, area.y, max(0.0, area.width - width), area.height)
    height, x = (total / area.width if area.width else 0.0), area.x
    for size in row:
        width = size / height if height else 0.0
        placed.append(Rectangle(x, area.y, width, height))
        x += width
    return placed, Rectangle(area.x, area.y + height, area.width, max(0.0, area.height - height))
