"""What is on the page of a report, from what a run tells of itself. Pure; the template only lays it out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from asyncdcp.cli.opening import note_of
from asyncdcp.cli.report.charts import STAGES, Bar, Lane, Point, Series, line_chart, timeline, treemap
from asyncdcp.cli.text import count_text, number_text, seconds_text, shown, size_text, time_text
from asyncdcp.cli.tree import Node
from asyncdcp.runs import Run, Saved
from asyncdcp.runs.listing import State

_SAVES_SHOWN = 20
"""So many of the last saves have a row in the timeline."""


@dataclass(frozen=True)
class Figure:
    """A number at the top of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A chart (SVG), what it shows, and its series by name and style where there is more than one."""

    title: str
    svg: str
    note: str = ""
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Line:
    """A row of the table of checkpoints. ``share`` is its size beside the greatest."""

    step: int
    state: str
    saved: str
    size: str
    share: float
    ranks: str
    metrics: tuple[str, ...]
    note: str
    latest: bool


@dataclass(frozen=True)
class Page:
    """All that the template shows. ``saves`` is None where the run has no history, ``sizes`` where nothing is whole."""

    title: str
    location: str
    made: str
    figures: tuple[Figure, ...]
    metric_names: tuple[str, ...]
    lines: tuple[Line, ...]
    metrics: tuple[Picture, ...]
    costs: tuple[Picture, ...]
    saves: Picture | None
    sizes: Picture | None


def page_of(run: Run, history: Sequence[Saved], tree: Sequence[Node], now: float) -> Page:
    """The page of a run; ``tree`` are the tensors of its latest checkpoint."""
    recorded = [saved.metrics for saved in history] + [checkpoint.metrics for checkpoint in run.checkpoints]
    names = tuple(dict.fromkeys(name for metrics in recorded for name in metrics))
    kept = tuple(dict.fromkeys(name for checkpoint in run.checkpoints for name in checkpoint.metrics))
    return Page(
        title=shown(run.location.rstrip("/").rsplit("/", 1)[-1]),
        location=shown(run.location),
        made=time_text(now),
        figures=tuple(_figures(run, history)),
        metric_names=tuple(map(shown, kept)),
        lines=tuple(_lines(run, kept)),
        metrics=tuple(picture for name in names if (picture := _metric(run, history, name)) is not None),
        costs=tuple(_costs(run, history)),
        saves=_saves(history),
        sizes=_sizes(run, tree),
    )


# ── figures and the table ───────────────────────────────────────────────────────────────────────────────────────────


def _figures(run: Run, history: Sequence[Saved]) -> list[Figure]:
    good, latest = run.good(), run.known_latest()
    without = "none" if run.sealed_beyond() is None else "unknown"
    bad = [text for text in (_count(run, "damaged"), _count(run, "encrypted")) if text]
    figures = [
        Figure("Latest step", f"{latest.step:,}" if latest else without, time_text(latest.time) if latest else ""),
        Figure("Checkpoints", f"{len(good):,}", ", ".join(bad) or "to resume from"),
        Figure("On disk", size_text(sum(checkpoint.size for checkpoint in run.checkpoints)), "all files of the run"),
    ]
    if history:
        stall = median(saved.staged_seconds for saved in history)
        durable = median(saved.durable_seconds for saved in history)
        rate = median(_rate(saved) for saved in history)
        saves = f"median of {count_text(len(history), 'save')}"
        figures += [
            Figure("Copied after", seconds_text(stall), saves),
            Figure("Durable after", seconds_text(durable), saves),
            Figure("Throughput", f"{size_text(int(rate))}/s", saves),
        ]
    return figures


def _count(run: Run, state: State) -> str:
    number = sum(checkpoint.state == state for checkpoint in run.checkpoints)
    return f"{number:,} {state}" if number else ""


def _rate(saved: Saved) -> float:
    return saved.tensor_bytes / max(saved.durable_seconds, 1e-9)


def _lines(run: Run, metrics: Sequence[str]) -> list[Line]:
    greatest = max((checkpoint.size for checkpoint in run.checkpoints), default=0) or 1
    latest = run.known_latest()
    return [
        Line(
            step=checkpoint.step,
            state=checkpoint.state,
            saved=time_text(checkpoint.time) if checkpoint.time else "",
            size=size_text(checkpoint.size),
            share=100 * checkpoint.size / greatest,
            ranks=str(checkpoint.ranks or ""),
            metrics=tuple(_value(checkpoint.metrics.get(name)) for name in metrics),
            note=note_of(checkpoint),
            latest=checkpoint is latest,
        )
        for checkpoint in reversed(run.checkpoints)
    ]


def _value(value: float | None) -> str:
    return "" if value is None else number_text(value)


# ── pictures ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _metric(run: Run, history: Sequence[Saved], name: str) -> Picture | None:
    """The metric of every save, or, without a history, of the checkpoints that are there."""
    points, title = [], shown(name)
    for found in history or run.checkpoints:
        value = found.metrics.get(name)
        if value is not None and math.isfinite(value):
            tip = f"step {found.step}: {title} {number_text(value)}, {time_text(found.time)}"
            points.append(Point(found.step, value, tip, dim=not run.line.holds(found.term, found.step)))
    if not points:
        return None
    return Picture(title, line_chart(title, [Series(title, "one", points)], number_text, from_zero=False))


def _costs(run: Run, history: Sequence[Saved]) -> list[Picture]:
    if not history:
        return []

    def points(what: str, values: Sequence[float], text: str) -> list[Point]:
        return [
            Point(saved.step, value, f"step {saved.step}: {what} {text.format(_shown(what, value))}")
            for saved, value in zip(history, values, strict=True)
        ]

    stall = [
        Series("copied", "one", points("copied after", [saved.staged_seconds for saved in history], "{}")),
        Series("call", "two", points("save() took", [saved.called_seconds for saved in history], "{}")),
    ]
    durable = [Series("durable", "one", points("durable after", [saved.durable_seconds for saved in history], "{}"))]
    rate = [Series("rate", "one", points("throughput", [_rate(saved) for saved in history], "{}/s"))]
    stored = [Series("stored", "one", points("stored", [float(saved.stored_bytes) for saved in history], "{}"))]
    return [
        Picture(
            "Stall",
            line_chart("Stall", stall, seconds_text, from_zero=True),
            "until the tensors could be changed again",
            (("copied", "one"), ("the call of save()", "two")),
        ),
        Picture("Durable", line_chart("Durable", durable, seconds_text, from_zero=True), "from the call of save()"),
        Picture("Throughput", line_chart("Throughput", rate, _rate_tick, from_zero=True), "tensor bytes made durable"),
        Picture("Stored", line_chart("Stored", stored, _size_tick, from_zero=True), "bytes in data files"),
    ]


def _shown(what: str, value: float) -> str:
    return size_text(int(value)) if what in ("throughput", "stored") else seconds_text(value)


def _size_tick(value: float) -> str:
    """Round numbers, without the zeros that ``size_text`` puts behind them."""
    number, unit = size_text(int(value)).split()
    return f"{float(number):g} {unit}"


def _rate_tick(value: float) -> str:
    return f"{_size_tick(value)}/s"


def _saves(history: Sequence[Saved]) -> Picture | None:
    timed = [saved for saved in history if saved.stages][-_SAVES_SHOWN:]
    if not timed:
        return None
    lanes = [
        Lane(
            f"step {saved.step:,}",
            [Bar(stage, *times) for stage, times in _stages(saved)],
        )
        for saved in reversed(timed)
    ]
    what = "the last save" if len(timed) == 1 else f"the last {len(timed)} saves, newest first"
    seen = {bar.stage for lane in lanes for bar in lane.bars}
    others = sorted(seen - set(STAGES))
    legend = [(stage, stage) for stage in STAGES if stage in seen] + [(", ".join(map(shown, others)), "other")]
    title = "What each save did when"
    return Picture(title, timeline(title, lanes), what, tuple(legend if others else legend[:-1]))


def _stages(saved: Saved) -> list[tuple[str, tuple[float, float, int]]]:
    """Each stage's begin, end and bytes."""
    return [(name, (each.begin, each.end, each.bytes)) for name, each in saved.stages.items()]


def _sizes(run: Run, tree: Sequence[Node]) -> Picture | None:
    latest = run.known_latest()
    if latest is None or not any(node.size for node in tree):
        return None
    size = size_text(sum(node.size for node in tree))
    return Picture("Sizes", treemap("Sizes", tree), f"the tensors of step {latest.step:,}, {size} in all")
