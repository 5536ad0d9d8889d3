"""``asyncdcp diff``: two checkpoints by structure, from their indexes; with ``--values`` how far tensors moved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from asyncdcp.cli.entries import Entry, chosen, entries_of, plain_text
from asyncdcp.cli.opening import complete_entry, opened
from asyncdcp.cli.output import DIFFERENT, say, say_json
from asyncdcp.cli.targets import AS_JSON, PLACE, run
from asyncdcp.cli.text import Column, bad, count_text, dim, good, shown, size_text, table, warned

if TYPE_CHECKING:
    from asyncdcp.cli.moves import Move

_SHOWN = 30
_MOVES = (
    Column("name", cut=True),
    Column("shape"),
    Column("moved", right=True),
    Column("mean |a-b|", right=True),
    Column("max |a-b|", right=True),
    Column("changed", right=True),
    Column("beware"),
)


@dataclass(frozen=True)
class Difference:
    """A name that is in one checkpoint only, or in both and not the same."""

    name: str
    kind: str
    a: str | None
    b: str | None


@click.command()
@click.argument("a", metavar="A", type=PLACE)
@click.argument("b", metavar="B", type=PLACE)
@click.option("--values", is_flag=True, help="Read the tensors that both have, and say how far they moved.")
@click.option(
    "-t", "--tensor", "globs", metavar="GLOB", multiple=True, shell_complete=complete_entry, help="Only these names."
)
@click.option("-a", "--all", "everything", is_flag=True, help=f"Every line, not only {_SHOWN} of a kind.")
@AS_JSON
def command(a: str, b: str, globs: tuple[str, ...], *, values: bool, everything: bool, as_json: bool) -> int:
    """Compare two checkpoints: names, dtypes, shapes and plain values; with --values tensors, too.

    MOVED is the length of the difference beside the length of A's tensor (‖a-b‖/‖a‖). The exit status is 0 if there is
    no difference, 1 if there is one.
    """
    return run(_diff, (a, b), globs, values=values, everything=everything, as_json=as_json)


async def _diff(
    places: tuple[str, str], globs: tuple[str, ...], *, values: bool, everything: bool, as_json: bool
) -> int:
    async with opened(places[0], data=values) as a, opened(places[1], data=values) as b:
        ours, theirs = entries_of(a), entries_of(b)
        if globs:
            names = {entry.name for entry in chosen([*ours, *theirs], globs)}
            ours, theirs = ([entry for entry in each if entry.name in names] for each in (ours, theirs))
        found = differences(ours, theirs)
        moves = None
        if values:
            from asyncdcp.cli.moves import measure_moves  # numpy, which the structure does without

            moves = await measure_moves(a, b, ours, theirs)
    if as_json:
        say_json(_as_json(found, moves))
    else:
        limit = len(ours) + len(theirs) if everything else _SHOWN
        say(_lines(places, found, len({entry.name for entry in ours} & {entry.name for entry in theirs}), limit))
        if moves is not None:
            say(_moved(moves, limit))
    return DIFFERENT if found or any(move.changed for move in moves or ()) else 0


def differences(ours: list[Entry], theirs: list[Entry]) -> list[Difference]:
    """What the indexes tell, in A's order and then B's."""
    by_name = {entry.name: entry for entry in theirs}
    found = []
    for entry in ours:
        other = by_name.pop(entry.name, None)
        a = _described(entry)
        if other is None:
            found.append(Difference(entry.name, "only in A", a, None))
        elif a != (b := _described(other)):
            found.append(Difference(entry.name, "changed", a, b))
    found += [Difference(entry.name, "only in B", None, _described(entry)) for entry in by_name.values()]
    return found


def _described(entry: Entry) -> str:
    if not entry.is_tensor:
        return plain_text(entry.value, 200)
    tied = f" → {entry.alias_of}" if entry.alias_of else ""
    return f"{entry.dtype} {list(entry.shape)}{tied}"


def _lines(places: tuple[str, str], found: list[Difference], both: int, limit: int) -> Iterator[str]:
    for mark, kind, place in (("-", "only in A", places[0]), ("+", "only in B", places[1])):
        some = [each for each in found if each.kind == kind]
        if some:
            yield f"{kind} ({shown(place)}): {len(some):,}"
            for each in some[:limit]:
                paint = bad if mark == "-" else good
                yield f"  {paint(mark)} {shown(each.name)}  {dim(shown(each.a or each.b or ''))}"
            yield from _rest(len(some), limit)
    changed = [each for each in found if each.kind == "changed"]
    if changed:
        yield f"changed: {len(changed):,}"
        for each in changed[:limit]:
            yield f"  {warned('~')} {shown(each.name)}  {shown(each.a or '')} → {shown(each.b or '')}"
        yield from _rest(len(changed), limit)
    yield f"the same: {both - len(changed):,} of {count_text(both, 'name')} in both"


def _rest(number: int, limit: int) -> Iterator[str]:
    if number > limit:
        yield dim(f"  … and {number - limit:,} more; --all shows them")


def _moved(moves: list[Move], limit: int) -> Iterator[str]:
    equal = [move for move in moves if not move.changed]
    others = sorted((move for move in moves if move.changed), key=lambda move: -move.order)
    size = size_text(sum(move.size for move in moves))
    yield f"values: {len(equal):,} of {count_text(len(moves), 'tensor')} the same ({size} compared)"
    if others:
        yield ""
        yield from table(_MOVES, [(shown(move.name), *move.cells()) for move in others[:limit]])
        yield from _rest(len(others), limit)


def _as_json(found: list[Difference], moves: list[Move] | None) -> dict[str, Any]:
    return {
        "differences": [{"name": each.name, "kind": each.kind, "a": each.a, "b": each.b} for each in found],
        "values": None if moves is None else [move.as_json() for move in moves],
    }
