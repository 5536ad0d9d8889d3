"""What of a run is of no use to anybody, and taking it away: first the plan, which is pure, then the deed.

A checkpoint is deleted so that a crash in the middle leaves it whole or absent, never torn. The Record decides what is
there, so it goes first, and durably, before any other file does: from then on the directory holds no checkpoint, only
leftovers, which the next writer or ``gc`` takes away. Records of commits that this one had replaced go before it, since
without it they would count again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import msgspec
from anyio import to_thread

from asyncdcp.errors import CheckpointGone, KeyUnavailable
from asyncdcp.extensions import ExtensionRegistry, Seals
from asyncdcp.metadata import RECORD_LIMIT, Record
from asyncdcp.names import file_save_id, record_name, record_save_id, temporary_save_id
from asyncdcp.runs.layout import step_of
from asyncdcp.runs.listing import Run
from asyncdcp.runs.saves import Outcomes, read_outcomes, saves_of
from asyncdcp.runs.settling import abort_save, delete_files
from asyncdcp.storage import Contents, Place, Storage

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


async def delete_checkpoint(place: Place, name: str, save_id: str, registry: ExtensionRegistry | None = None) -> None:
    """Deletes the commit ``save_id`` of sub-place ``name``, with all that it replaced. Safe to repeat after a crash.
    ``KeyUnavailable`` if its Record is encrypted, with a key that ``registry`` does not have: what it replaced is
    unknown then.

    Aborts stay: their names must not become free while a save that was given up might still try to commit. With the
    last file the sub-place goes, too.
    """
    survey = await place.survey(lambda child, file: child == name and record_save_id(file) is not None, RECORD_LIMIT)
    if name not in survey.children:
        return
    contents = survey.children[name]
    outcomes = await to_thread.run_sync(read_outcomes, contents, Seals(registry or ExtensionRegistry()))
    if save_id in outcomes.sealed:
        path = place.child(name).info.location
        raise KeyUnavailable(f"{path} is not deleted: {outcomes.sealed[save_id]}", path=path)
    own = outcomes.records.get(save_id)
    replaced = _replaced(own, outcomes)
    storage = place.child(name)
    if own is not None:
        if own.replaces:  # one that is gone already may come back by a loss of power, if nobody has synced that yet
            await storage.delete([record_name(each) for each in replaced])
            await storage.barrier()
        await storage.delete([record_name(save_id)])
        await storage.barrier()
    gone = {save_id, *replaced}
    await storage.delete([file for file in contents.objects if file_save_id(file) in gone])
    await place.discard(name, [each for each in contents.temporaries if temporary_save_id(each) in gone])


def _replaced(own: Record | None, outcomes: Outcomes) -> set[str]:
    """The commits that this one took the place of; an encrypted one is a commit, for only those are replaced."""
    named = set(own.replaces) if own else set()
    commits = {each for each in named & outcomes.records.keys() if outcomes.records[each].outcome == "commit"}
    return commits | named & outcomes.sealed.keys()


async def check_there(storage: Storage, save_id: str) -> None:
    """``CheckpointGone`` if the commit ``save_id``, which was there, has been deleted since."""
    if record_name(save_id) not in await storage.list():
        path = storage.info.location
        raise CheckpointGone(f"the checkpoint at {path} was deleted before it was read; read a newer one", path=path)
