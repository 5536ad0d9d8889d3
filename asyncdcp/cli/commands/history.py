"""``asyncdcp history``: the metrics of every save of a run, those of deleted checkpoints too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import click
from msgspec import to_builtins

from asyncdcp.cli.entries import no_such_name
from asyncdcp.cli.opening import open_run
from asyncdcp.cli.output import say, say_json
from asyncdcp.cli.targets import AS_JSON, PLACE, run
from asyncdcp.cli.text import (
    Column,
    count_text,
    dim,
    iso_text,
    number_text,
    seconds_text,
    shown,
    size_text,
    table,
    time_text,
)
from asyncdcp.runs import Saved
from asyncdcp.runs.history import open_history

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60


@click.command()
@click.argument("place", metavar="RUN", type=PLACE)
@click.option("-m", "--metric", "metrics", metavar="NAME", multiple=True, help="Only this metric. May be repeated.")
@click.option("-n", "--last", type=click.IntRange(min=1), metavar="N", help="Only the last N saves.")
@AS_JSON
def command(place: str, metrics: tuple[str, ...], last: int | None, *, as_json: bool) -> None:
    """Show how the metrics of a run went, and what each save cost.

    STAGED is the time until the tensors could be changed again, DURABLE until the checkpoint would have survived a
    loss of power.
    """
    run(_history, place, metrics, last, as_json=as_json)


async def _history(target: str, metrics: tuple[str, ...], last: int | None, *, as_json: bool) -> None:
    place, _ = await open_run(target)
    saves, sealed = await open_history(place)
    if last is not None:
        saves = saves[-last:]
    known = list(dict.fromkeys(name for saved in saves for name in saved.metrics))
    for name in metrics:
        if name not in known:
            raise click.ClickException(no_such_name(name, known, "asyncdcp history RUN"))
    if as_json:
        say_json([{**to_builtins(saved), "time": iso_text(saved.time)} for saved in saves])
    elif saves:
        say(_lines(saves, metrics or tuple(known)))
    elif not sealed:
        say(f"no history: {shown(target)} has no history.jsonl, or nothing was committed yet")
    if sealed and not as_json:
        unread = count_text(sealed, "encrypted save")
        say(dim(f"{unread} cannot be opened (another key than in ASYNCDCP_KEY, or damaged)"))


def _lines(saves: Sequence[Saved], metrics: Sequence[str]) -> Iterator[str]:
    terms = len({saved.term for saved in saves if saved.term}) > 1
    columns = [
        Column("step", right=True),
        Column("term", right=True),
        Column("saved"),
        *(Column(shown(name), right=True) for name in metrics),
        Column("size", right=True),
        Column("staged", right=True),
        Column("durable", right=True),
    ]
    yield from table(columns, [_row(saved, metrics, terms=terms) for saved in saves])
    for name in metrics:
        values = [value for saved in saves if (value := saved.metrics.get(name)) is not None and math.isfinite(value)]
        if len(values) > 1:
            ends = f"{number_text(values[0])} → {number_text(values[-1])}"
            least = f"least {number_text(min(values))}, greatest {number_text(max(values))}"
            yield f"{shown(name)}  {sparkline(values, _WIDTH)}  {ends}  {dim(least)}"


def _row(saved: Saved, metrics: Sequence[str], *, terms: bool) -> list[str]:
    values = [saved.metrics.get(name) for name in metrics]
    return [
        str(saved.step),
        str(saved.term or "") if terms else "",
        time_text(saved.time),
        *("" if value is None else number_text(value) for value in values),
        size_text(saved.stored_bytes),
        seconds_text(saved.staged_seconds),
        seconds_text(saved.durable_seconds),
    ]


def sparkline(values: Sequence[float], width: int) -> str:
    """Finite values as bars; of more than ``width`` the mean of each of ``width`` runs."""
    count = min(len(values), width)
    cuts = [len(values) * n // count for n in range(count + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    if not high > low:
        return _BARS[3] * count
    return "".join(_BARS[min(7, int(8 * ((mean - low) / (high - low))))] for mean in means)
