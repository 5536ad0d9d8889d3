"""Pictures of results, for people."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.results import Results

_OWN: Final = "#d9480f"
_OTHER: Final = "#748ffc"
_LIMIT: Final = "#adb5bd"


def plot(results: Results, folder: Path) -> list[Path]:
    """Draws what there is to draw of a case; returns the files. Needs matplotlib (``asyncdcp[bench]``)."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    made = [_bars(results, metric, folder) for metric in _metrics(results)]
    if results.case == "train" and results.series:
        made.append(_steps(results, folder))
    if results.case == "growth":
        made.append(_curves(results, folder))
    return made


def _metrics(results: Results) -> list[str]:
    if results.case == "growth":
        return []
    wanted = {"save": ("stall", "durable"), "train": ("lost",), "lag": ("p99",)}.get(results.case)
    found = dict.fromkeys(metric for metrics in results.samples.values() for metric in metrics)
    return [metric for metric in found if wanted is None or metric in wanted]


def _bars(results: Results, metric: str, folder: Path) -> Path:
    """A bar a subject: the median, and from the lowest to the highest."""
    import matplotlib.pyplot as plt

    told = {name: found[metric] for name, found in results.samples.items() if metric in found}
    middles = [statistics.median(values) * results.scale for values in told.values()]
    low = [middle - min(values) * results.scale for middle, values in zip(middles, told.values(), strict=True)]
    high = [max(values) * results.scale - middle for middle, values in zip(middles, told.values(), strict=True)]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(told) + 1.4), layout="constrained")
    bars = axes.barh(list(told), middles, xerr=[low, high], color=[_color(name) for name in told], ecolor="#495057")
    axes.bar_label(bars, labels=[f"{middle:.3g}" for middle in middles], padding=6)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"{metric} [{results.unit}]: median, lowest to highest")
    axes.set_title(f"{results.case}: {results.about}", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return _saved(figure, folder / f"{results.case}-{metric.replace(' ', '-')}.png")


def _steps(results: Results, folder: Path) -> Path:
    """How long each training step took around a save, a row a peer."""
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(
        len(results.series), figsize=(8, 1.1 * len(results.series) + 1), layout="constrained", sharex=True, sharey=True
    )
    for axes, (name, points) in zip(_list(rows), _in_order(results), strict=True):
        axes.bar([x for x, _ in points], [1000 * y for _, y in points], width=1.0, color=_color(name))
        axes.axvline(-0.5, color="#495057", linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_title(name, fontsize=9, loc="left", pad=2)
        axes.spines[["top", "right"]].set_visible(False)
    _list(rows)[-1].set_xlabel("training steps; a save begins at 0")
    figure.supylabel("ms a step", fontsize=9)
    return _saved(figure, folder / "train-steps.png")


def _in_order(results: Results) -> list[tuple[str, list[tuple[float, float]]]]:
    return [(name, results.series[name]) for name in results.samples if name in results.series]


def _curves(results: Results, folder: Path) -> Path:
    """Cost per byte and per tensor, against size."""
    import matplotlib.pyplot as plt

    figure, columns = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axes, per in zip(columns, ("byte", "tensor"), strict=True):
        for name, points in results.series.items():
            if name.endswith(per):
                axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"{per}s, times as many")
        axes.set_ylabel("ns per byte" if per == "byte" else "µs per tensor")
        axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return _saved(figure, folder / "growth.png")


def _list(axes: Any) -> Sequence[Any]:
    return axes if hasattr(axes, "__len__") else [axes]


def _color(name: str) -> str:
    return _OWN if name.startswith("asyncdcp") else _LIMIT if "limits" in name else _OTHER


def _saved(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
