"""``asyncdcp gc``: what of a run is of no use to anybody; deleted only where that was asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import click
from msgspec import to_builtins

from asyncdcp.cli.opening import open_run
from asyncdcp.cli.output import TROUBLE, say, say_json
from asyncdcp.cli.targets import AS_JSON, PLACE, run
from asyncdcp.cli.text import Column, count_text, describe, dim, shown, size_text, table
from asyncdcp.errors import AsyncDCPError
from asyncdcp.runs import Leftover, collect, plan_collection
from asyncdcp.storage import Place

OLDER_THAN = 3600.0
_COLUMNS = (
    Column("what"),
    Column("where"),
    Column("save"),
    Column("files", right=True),
    Column("size", right=True),
    Column("outcome", cut=True),
)


@click.command()
@click.argument("place", metavar="RUN", type=PLACE)
@click.option("--delete", is_flag=True, help="Delete it. Without this nothing is changed.")
@click.option(
    "--older-than",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=OLDER_THAN,
    show_default=True,
    help="Leave alone what was written to within so many seconds: it may be a save under way.",
)
@click.option("--off-line", is_flag=True, help="Take checkpoints that a rollback left behind, too.")
@AS_JSON
def command(place: str, *, delete: bool, older_than: float, off_line: bool, as_json: bool) -> int:
    """Show what of a run is of no use, and with --delete take it away.

    That is: saves that were cut off or given up, checkpoints that others replaced, temporary files, empty folders. No
    checkpoint that a run can resume from is ever taken; what a run keeps of those is its retention's affair.
    """
    return run(_gc, place, delete=delete, older_than=older_than, off_line=off_line, as_json=as_json)


async def _gc(target: str, *, delete: bool, older_than: float, off_line: bool, as_json: bool) -> int:
    place, found = await open_run(target)
    plan = plan_collection(found, now=time.time(), older_than=older_than, off_line=off_line)
    outcomes = [await _collected(place, leftover) if delete else "" for leftover in plan]
    deleted = [outcome == _DELETED for outcome in outcomes]
    if as_json:
        say_json(
            [
                {**to_builtins(leftover), "deleted": gone, "outcome": outcome or None}
                for leftover, gone, outcome in zip(plan, deleted, outcomes, strict=True)
            ]
        )
    else:
        young = len(plan_collection(found, now=time.time(), older_than=0, off_line=off_line)) - len(plan)
        again = f"asyncdcp gc {shown(target)}{_options(older_than, off_line=off_line)} --delete"
        say(_lines(plan, outcomes, again, delete=delete))
        if young:
            say(dim(f"left alone: {young:,} that something was written to within {older_than:g} s (--older-than)"))
    return TROUBLE if delete and any(outcome not in (_DELETED, _COMMITTED) for outcome in outcomes) else 0


_DELETED = "deleted"
_COMMITTED = "left: it has committed meanwhile"


async def _collected(place: Place, leftover: Leftover) -> str:
    """What became of it. One that cannot be deleted does not keep the others."""
    try:
        return _DELETED if await collect(place, leftover) else _COMMITTED
    except (AsyncDCPError, OSError) as error:
        return f"not deleted: {describe(error)}"


def _options(older_than: float, *, off_line: bool) -> str:
    older = "" if older_than == OLDER_THAN else f" --older-than {older_than:g}"
    return older + (" --off-line" if off_line else "")


def _lines(plan: Sequence[Leftover], outcomes: Sequence[str], again: str, *, delete: bool) -> Iterator[str]:
    if not plan:
        yield "nothing to delete"
        return
    yield from table(
        _COLUMNS,
        [
            (
                leftover.kind,
                shown(leftover.name),
                leftover.save_id or "",
                str(leftover.files),
                size_text(leftover.size),
                outcome,
            )
            for leftover, outcome in zip(plan, outcomes, strict=True)
        ],
    )
    gone = [leftover for leftover, outcome in zip(plan, outcomes, strict=True) if outcome == _DELETED or not delete]
    what = f"{count_text(sum(leftover.files for leftover in gone), 'file')}, {size_text(sum(x.size for x in gone))}"
    if delete:
        yield dim(f"deleted: {what}")
    else:
        yield dim(f"{what} could be deleted, and nothing was: {again}")
