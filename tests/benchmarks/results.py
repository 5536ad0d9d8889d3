"""What a case has measured, and the table of it."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

_RESAMPLES: Final = 2000


@dataclass(frozen=True)
class Ratio:
    """``metric`` of ``one`` over ``of`` of ``other``, of the same round; ``limit`` is the budget if there is one."""

    label: str
    one: str
    metric: str
    other: str
    of: str
    limit: float | None = None


@dataclass(frozen=True)
class Budget:
    """The most that the median of a subject's metric may be."""

    subject: str
    metric: str
    limit: float


@dataclass
class Results:
    """Of one case: ``samples[subject][metric]`` are a value a round. ``scale`` and ``unit`` say how to print."""

    case: str
    about: str
    unit: str = "s"
    scale: float = 1.0
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    ratios: list[Ratio] = field(default_factory=list)
    budgets: list[Budget] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    series: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """For the plots: points of a curve, by its name."""

    def add(self, subject: str, **values: float) -> None:
        """One round of a subject."""
        metrics = self.samples.setdefault(subject, {})
        for metric, value in values.items():
            metrics.setdefault(metric.replace("_", " "), []).append(value)

    def order(self, subjects: Iterable[str]) -> None:
        """Tables name the subjects in this order."""
        self.samples = {subject: {} for subject in subjects}

    def values(self, ratio: Ratio) -> list[float]:
        """A ratio's, round by round; none where one side was not measured."""
        ones = self.samples.get(ratio.one, {}).get(ratio.metric, [])
        others = self.samples.get(ratio.other, {}).get(ratio.of, [])
        return [one / other for one, other in zip(ones, others, strict=False) if other]

    def as_json(self) -> dict[str, Any]:
        """Every single measurement, and the ratios."""
        ratios = {ratio.label: self.values(ratio) for ratio in self.ratios}
        return {**asdict(self), "ratios": ratios}

    def table(self) -> str:
        """Medians, lowest and highest: first of the subjects, then of the ratios with their budgets."""
        metrics = list(dict.fromkeys(metric for found in self.samples.values() for metric in found))
        rows = [["", *metrics]]
        for subject, found in self.samples.items():
            rows.append([subject, *(spread(found[m], self.scale) if m in found else "" for m in metrics)])
        lines = [f"{self.case}: {self.about}", f"{self.unit}: median (lowest to highest)", *_columns(rows)]
        told = [(ratio, values) for ratio in self.ratios if (values := self.values(ratio))]
        if told:
            lines += ["", "of the same round: median (lowest to highest)"]
            lines += _columns([[ratio.label, spread(values), _verdict(values, ratio.limit)] for ratio, values in told])
        for budget in self.budgets:
            if values := self.samples.get(budget.subject, {}).get(budget.metric, []):
                said = _verdict(values, budget.limit, self.scale)
                lines.append(f"{budget.subject}: {budget.metric} {spread(values, self.scale)} {self.unit}, {said}")
        return "\n".join([*lines, *self.notes])


def spread(values: Sequence[float], scale: float = 1.0) -> str:
    """``median (lowest to highest)``."""
    low, high = min(values) * scale, max(values) * scale
    return f"{statistics.median(values) * scale:.4g} ({low:.3g} to {high:.3g})"


def interval(values: Sequence[float], share: float = 0.95) -> tuple[float, float]:
    """The bootstrap confidence interval of the median (Efron 1979); the same for the same values."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    cut = int(len(medians) * (1 - share) / 2)
    return medians[cut], medians[-1 - cut]


def _verdict(values: Sequence[float], limit: float | None, scale: float = 1.0) -> str:
    if limit is None:
        return ""
    return f"{'reached' if statistics.median(values) <= limit else 'MISSED'}: at most {limit * scale:g}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[number]) for row in rows) for number in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
