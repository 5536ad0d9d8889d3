"""What of a run is of no use to anybody, and taking it away: first the plan, which is pure, then the deed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import msgspec

from asyncdcp.extensions import ExtensionRegistry
from asyncdcp.names import file_save_id, record_name, temporary_save_id
from asyncdcp.runs.deletion import delete_checkpoint
from asyncdcp.runs.layout import step_of
from asyncdcp.runs.listing import Run
from asyncdcp.runs.outcomes import Outcomes, saves_of
from asyncdcp.runs.settling import abort_save, delete_files
from asyncdcp.storage import Contents, Place

Kind: TypeAlias = Literal["dead save", "given-up save", "replaced", "off the line", "temporaries", "empty"]


class Leftover(msgspec.Struct, frozen=True):
    """Something to take away: what kind of thing, in which sub-place, of which save, how many files and bytes."""

    kind: Kind
    name: str
    save_id: str | None
    files: int
    size: int
    temporaries: tuple[str, ...] = ()


def plan_collection(run: Run, *, now: float, older_than: float = 3600.0, off_line: bool = False) -> list[Leftover]:
    """What can go. ``now`` is seconds since the epoch; what was changed within ``older_than`` seconds is left alone.

    A dead save has no Record: it was cut off, or it is under way and has not written anything for so long; collecting
    it claims its Record with an abort first, so at worst it fails, and is never torn. ``off_line=True`` also takes the
    committed checkpoints that a rollback left behind, and late commits of writers that were replaced. What is
    encrypted, with a key that is not at hand, is left alone.
    """
    plan: list[Leftover] = []
    for name, contents in sorted(run.survey.children.items()):
        step = step_of(name)
        if step is None or "" in contents.unread:
            continue
        off = {
            checkpoint.save_id
            for checkpoint in run.checkpoints
            if off_line and checkpoint.name == name and checkpoint.state == "committed" and not checkpoint.on_line
        }
        plan += (
            each
            for each in _of_saves(name, contents, run.outcomes[name], off)
            if _age(contents, each, now) >= older_than
        )
        plan += (each for each in _of_temporaries(name, contents, now - older_than))
    return plan


async def collect(place: Place, leftover: Leftover, registry: ExtensionRegistry | None = None) -> bool:
    """Takes one thing away; False if it turned out to be of use: a save that has committed meanwhile.

    ``registry`` has the keys of checkpoints with hidden metadata, by default those of the environment.
    """
    name, save_id = leftover.name, leftover.save_id
    if leftover.kind == "dead save" and save_id is not None:
        return await abort_save(place, name, save_id, cause="collected: it had no Record and did not move")
    if leftover.kind == "off the line" and save_id is not None:
        await delete_checkpoint(place, name, save_id, registry)
    elif save_id is not None:
        storage = place.child(name)
        await delete_files(storage, save_id)
        await storage.barrier()
        await storage.delete([record_name(save_id)])
        await place.discard(name)
    else:
        await place.discard(name, leftover.temporaries)
    return True


def _of_saves(name: str, contents: Contents, outcomes: Outcomes, off: set[str | None]) -> Iterator[Leftover]:
    records = outcomes.records
    left = {record.save_id for record in outcomes.live} | outcomes.broken.keys() | outcomes.sealed.keys()
    for save_id, files in saves_of(contents).items():
        kind: Kind
        if save_id in off:
            kind = "off the line"
        elif save_id in left:
            continue
        elif save_id not in records:
            kind = "dead save"
        else:
            kind = "replaced" if records[save_id].outcome == "commit" else "given-up save"
        yield Leftover(kind, name, save_id, len(files), sum(files.values()))


def _of_temporaries(name: str, contents: Contents, before: float) -> Iterator[Leftover]:
    """Those of saves: any other name with a leading dot, such as torch's ``.metadata``, is somebody else's."""
    own = {file: found for file, found in contents.temporaries.items() if temporary_save_id(file) is not None}
    old = {file: found for file, found in own.items() if found.modified <= before}
    if old:
        yield Leftover("temporaries", name, None, len(old), sum(found.size for found in old.values()), tuple(old))
    elif not contents.objects and not contents.temporaries:
        yield Leftover("empty", name, None, 0, 0)


def _age(contents: Contents, leftover: Leftover, now: float) -> float:
    files = [found for file, found in contents.objects.items() if file_save_id(file) == leftover.save_id]
    return now - max(found.modified for found in files)


def total(plan: Sequence[Leftover]) -> int:
    """Bytes that carrying a plan out frees."""
    return sum(leftover.size for leftover in plan)
