"""``asyncdcp ls``: the checkpoints of a run, from names, sizes and Records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import click

from asyncdcp.cli.opening import note_of, open_run
from asyncdcp.cli.output import say, say_json
from asyncdcp.cli.targets import AS_JSON, PLACE, run
from asyncdcp.cli.text import (
    Column,
    bad,
    count_text,
    dim,
    good,
    iso_text,
    number_text,
    shown,
    size_text,
    table,
    time_text,
    warned,
)
from asyncdcp.names import record_name
from asyncdcp.runs import Checkpoint, Run

_NAMED = 5
_STYLES = {"committed": good, "partial": warned, "aborted": dim, "damaged": bad, "encrypted": warned}


@click.command()
@click.argument("place", metavar="RUN", type=PLACE)
@AS_JSON
def command(place: str, *, as_json: bool) -> None:
    """List the checkpoints of a run: step, state, when, size, ranks and metrics.

    \b
    committed  there whole, as far as its Record and the sizes of its files tell (verify reads the bytes)
    partial    begun and not committed: under way, or cut off
    aborted    given up
    damaged    committed, and files are missing or cannot be read
    encrypted  with hidden metadata, and its key is not in ASYNCDCP_KEY
    """
    run(_ls, place, as_json=as_json)


async def _ls(place: str, *, as_json: bool) -> None:
    _, found = await open_run(place)
    if as_json:
        say_json([_as_json(found, checkpoint) for checkpoint in found.checkpoints])
    elif found.checkpoints:
        say(_table(found))
    else:
        say(f"no checkpoints yet: {shown(place)} was opened for writing, and nothing was saved")


def _table(found: Run) -> Iterator[str]:
    checkpoints = found.checkpoints
    metrics = list(dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.metrics))
    terms = len({checkpoint.term for checkpoint in checkpoints if checkpoint.term}) > 1
    columns = [
        Column("step", right=True),
        Column("state"),
        Column("saved"),
        Column("size", right=True),
        Column("ranks", right=True),
        *(Column(shown(name), right=True) for name in metrics),
        Column("term", right=True),
        Column("note", cut=True),
    ]
    yield from table(columns, [_row(checkpoint, metrics, terms=terms) for checkpoint in checkpoints])
    good_ones = found.good()
    yield from map(warned, _sealed(checkpoints))
    if good_ones:
        total = size_text(sum(checkpoint.size for checkpoint in checkpoints))
        latest = f"the latest is step {good_ones[-1].step}"
        if found.sealed_beyond() is not None:
            latest = "the latest cannot be told without the key"
        yield dim(f"{count_text(len(good_ones), 'checkpoint')} to resume from, {latest}; {total} in all")


def _row(checkpoint: Checkpoint, metrics: Sequence[str], *, terms: bool) -> list[str]:
    values = [checkpoint.metrics.get(name) for name in metrics]
    return [
        str(checkpoint.step),
        _STYLES[checkpoint.state](checkpoint.state),
        time_text(checkpoint.time) if checkpoint.time else "",
        size_text(checkpoint.size),
        str(checkpoint.ranks or ""),
        *("" if value is None else number_text(value) for value in values),
        str(checkpoint.term or "") if terms else "",
        dim(note_of(checkpoint)),
    ]


def _sealed(checkpoints: Sequence[Checkpoint]) -> Iterator[str]:
    """Why some are encrypted, said once for all that lack the same key."""
    steps: dict[str, list[str]] = {}
    for each in checkpoints:
        if each.state == "encrypted":
            why = (each.cause or "").removeprefix(f"{record_name(each.save_id or '')} is encrypted: ")
            steps.setdefault(why, []).append(str(each.step))
    for why, named in steps.items():
        more = ", …" if len(named) > _NAMED else ""
        yield f"encrypted ({', '.join(named[:_NAMED])}{more}): {shown(why)}"


def _as_json(found: Run, checkpoint: Checkpoint) -> dict[str, Any]:
    summary = checkpoint.summary
    latest = found.known_latest()
    return {
        "step": checkpoint.step,
        "name": checkpoint.name,
        "state": checkpoint.state,
        "time": iso_text(checkpoint.time) if checkpoint.time else None,
        "bytes": checkpoint.size,
        "ranks": checkpoint.ranks,
        "metrics": checkpoint.metrics,
        "on_line": checkpoint.on_line,
        "latest": checkpoint is latest,
        "term": checkpoint.term,
        "save_id": checkpoint.save_id,
        "parent": checkpoint.parent,
        "tensors": summary.tensors if summary else None,
        "tensor_bytes": summary.tensor_bytes if summary else None,
        "stored_bytes": summary.stored_bytes if summary else None,
        "transforms": summary.transforms if summary else None,
        "metadata": checkpoint.metadata,
        "versions": checkpoint.versions,
        "cause": checkpoint.cause,
    }
