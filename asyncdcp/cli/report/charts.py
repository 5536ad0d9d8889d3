"""Pictures of a report as SVG, to stand in the page: lines over steps, saves over time, sizes as areas. Pure.

Colours are classes and variables of the page's style, so that they follow its light and dark. ``data-tip`` is what the
page shows of a part under the pointer. Every text goes through ``escape``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import NamedTuple

from asyncdcp.cli.text import seconds_text, size_text
from asyncdcp.cli.tree import Node

STAGES = ("stage", "transform", "write", "sync", "commit")
"""The stages of a save in the order in which they begin; the page's style knows each by its name."""

_WIDTH, _HEIGHT = 540, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 22, 14, 30
_DOTS = 150
"""More points than these are drawn as a line alone."""

_CHARACTER = 6.6
"""The width of a character, about, in the font that labels have."""


class Point(NamedTuple):
    """``dim`` is for what a rollback left behind."""

    x: float
    y: float
    tip: str
    dim: bool = False


class Series(NamedTuple):
    """A line; ``style`` is a class of the page."""

    name: str
    style: str
    points: Sequence[Point]


class Bar(NamedTuple):
    """A stage of a save, in seconds from the save's first."""

    stage: str
    begin: float
    end: float
    size: int


class Lane(NamedTuple):
    """A save as a row of a timeline."""

    label: str
    bars: Sequence[Bar]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers within the range."""
    step = _step(low, high, count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def rounded(low: float, high: float, count: int) -> tuple[float, float]:
    """The range, widened until ticks are at both ends."""
    step = _step(low, high, count)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _step(low: float, high: float, count: int) -> float:
    """1, 2 or 5 times a power of ten."""
    rough = max((high - low) / count, abs(high) * 1e-9, 1e-300)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


# ── lines over steps ────────────────────────────────────────────────────────────────────────────────────────────────


def line_chart(title: str, lines: Sequence[Series], y_text: Callable[[float], str], *, from_zero: bool) -> str:
    """Series over steps. Points of a series are in order; the line breaks where steps go back (a rollback)."""
    points = [point for series in lines for point in series.points]
    xs, ys = [point.x for point in points], [point.y for point in points]
    low, high = (0.0 if from_zero else min(ys)), max(ys)
    if not high > low:
        low, high = (0.0 if from_zero else low - (abs(low) or 1.0) / 2), high + (abs(high) or 1.0) / 2
    low, high = rounded(low, high, 4)
    left, right = min(xs), max(xs)

    def x_of(value: float) -> float:
        share = (value - left) / (right - left) if right > left else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [*_axes(ticks(left, right, 6), ticks(low, high, 4), x_of, y_of, y_text)]
    for series in lines:
        parts += _drawn(series, x_of, y_of)
    return _svg(_WIDTH, _HEIGHT, title, parts)


def _axes(
    across: Sequence[float],
    up: Sequence[float],
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    y_text: Callable[[float], str],
) -> Iterator[str]:
    for value in up:
        y = y_of(value)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_tick(value, y_text)}</text>'
    for value in across:
        if value == int(value):
            yield f'<text class="tick" x="{x_of(value):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{int(value)}</text>'


def _tick(value: float, text: Callable[[float], str]) -> str:
    return escape(text(value)) if value else "0"


def _drawn(series: Series, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> Iterator[str]:
    before: Point | None = None
    for dim, run in _runs(series.points):
        faint = " dim" if dim else ""
        joined = [before, *run] if before is not None and before.x <= run[0].x else run
        path = " ".join(f"{x_of(point.x):.1f},{y_of(point.y):.1f}" for point in joined)
        yield f'<polyline class="line {series.style}{faint}" points="{path}"/>'
        before = run[-1]
    if len(series.points) <= _DOTS:
        for point in series.points:
            faint, tip = (" dim" if point.dim else ""), escape(point.tip)
            spot = f'cx="{x_of(point.x):.1f}" cy="{y_of(point.y):.1f}" r="3.5"'
            yield f'<circle class="dot {series.style}{faint}" {spot} data-tip="{tip}"/>'


def _runs(points: Sequence[Point]) -> Iterator[tuple[bool, list[Point]]]:
    """Points that follow each other forwards, and are all dim or none."""
    run: list[Point] = []
    for point in points:
        if run and (point.x < run[-1].x or point.dim != run[-1].dim):
            yield run[-1].dim, run
            run = []
        run.append(point)
    if run:
        yield run[-1].dim, run


# ── saves over time ─────────────────────────────────────────────────────────────────────────────────────────────────


def timeline(title: str, lanes: Sequence[Lane]) -> str:
    """A row for each save, with a thin bar for each stage, all on one scale that begins with the save."""
    width, left, lane, thin = 1112, 120, 44, 6
    end = max((bar.end for row in lanes for bar in row.bars), default=0.0) or 1.0
    scale = (width - left - 20) / end
    height = len(lanes) * lane + 30
    parts = []
    for value in ticks(0.0, end, 8):
        x = left + value * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 24}"/>')
        text = _tick(value, seconds_text)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="middle">{text}</text>')
    for number, row in enumerate(lanes):
        top = number * lane + 4
        parts.append(f'<text class="label" x="{left - 12}" y="{top + 21}" text-anchor="end">{escape(row.label)}</text>')
        for bar in row.bars:
            y = top + (STAGES.index(bar.stage) if bar.stage in STAGES else len(STAGES)) * (thin + 1)
            parts.append(_bar(bar, left, scale, y, thin, row.label))
    return _svg(width, height, title, parts)


def _bar(bar: Bar, left: float, scale: float, y: float, height: float, label: str) -> str:
    lasted = bar.end - bar.begin
    rate = f", {size_text(int(bar.size / lasted))}/s" if bar.size and lasted > 0 else ""
    size = f", {size_text(bar.size)}" if bar.size else ""
    tip = f"{label} · {bar.stage}: {seconds_text(lasted)}, from {seconds_text(bar.begin)}{size}{rate}"
    width = max(1.5, lasted * scale)
    box = f'x="{left + bar.begin * scale:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" rx="2"'
    known = bar.stage if bar.stage in STAGES else "other"
    return f'<rect class="bar {known}" {box} data-tip="{escape(tip)}"/>'


# ── sizes as areas ──────────────────────────────────────────────────────────────────────────────────────────────────


def treemap(title: str, nodes: Sequence[Node]) -> str:
    """Tensors as areas, nested as their names are, each part of the state in a colour of its own."""
    width, height = 1112, 520
    kept = _by_size(nodes)
    areas = squarified([node.size for node in kept], Rectangle(0, 0, width, height))
    parts: list[str] = []
    for number, (node, area) in enumerate(zip(kept, areas, strict=True)):
        parts += _tile(node, area, node.label, f"c{number % 8}")
    return _svg(width, height, title, parts)


def _by_size(nodes: Sequence[Node]) -> list[Node]:
    return sorted((node for node in nodes if node.size), key=lambda node: -node.size)


def _tile(node: Node, area: Rectangle, name: str, colour: str) -> Iterator[str]:
    """A group is a frame with a caption and what is in it; what is too small to be seen is its group's colour."""
    children = _by_size(node.children)
    count = f", {node.tensors:,} tensors" if children else ""
    shape = f", {node.leaf.kind} {node.leaf.shape}" if node.leaf is not None and not children else ""
    tip = escape(f"{name}: {size_text(node.size)}{count}{shape}")
    box = f'x="{area.x:.1f}" y="{area.y:.1f}" width="{area.width:.1f}" height="{area.height:.1f}"'
    if not children or area.width < 6 or area.height < 6:
        yield f'<rect class="leaf {colour}" {box} data-tip="{tip}"/>'
        yield from _caption(node.label, size_text(node.size), area, "leaf-label")
        return
    yield f'<rect class="group {colour}" {box} data-tip="{tip}"/>'
    captioned = area.height > 44 and area.width > 60
    if captioned:
        yield from _caption(node.label, size_text(node.size), area, "group-label", one_line=True)
    inner = area.inset(min(2.0, area.width / 8, area.height / 8), 17.0 if captioned else 0.0)
    for child, place in zip(children, squarified([child.size for child in children], inner), strict=True):
        yield from _tile(child, place, f"{name}.{child.label}", colour)


def _caption(label: str, size: str, area: Rectangle, style: str, *, one_line: bool = False) -> Iterator[str]:
    room = int((area.width - 8) / _CHARACTER)
    if room < 4 or area.height < 15:
        return
    text = f"{label} · {size}" if one_line and len(label) + len(size) + 3 <= room else label
    yield f'<text class="{style}" x="{area.x + 5:.1f}" y="{area.y + 13:.1f}">{escape(_cut(text, room))}</text>'
    if not one_line and area.height > 32 and len(size) <= room:
        yield f'<text class="{style} faint" x="{area.x + 5:.1f}" y="{area.y + 27:.1f}">{escape(size)}</text>'


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 1]}…"


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
    return "".join((head, *parts, "</svg>"))


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
    """A rectangle for each size, in proportion, as near to a square as it gets; sizes are positive and fall. Together
    they fill ``area``.

    The algorithm is that of Bruls, Huizing and van Wijk, "Squarified Treemaps" (2000): rows are laid along the shorter
    side, and a row takes one more as long as its worst proportions do not get worse by that.
    """
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
