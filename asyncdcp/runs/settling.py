"""What earlier writers of a run left in flight: waited for while it moves, given up once it does not.

A save without a Record is under way or dead, and nothing tells which for sure: its background process may outlive its
trainer to commit what was staged. So whoever takes a run over watches it. What changes is waited for; what has not
changed for ``quiet`` seconds, by the storage's own clock, is given up: its Record is claimed by an abort. That claim
decides, no clock does; a save that was only slow finds the abort, or had committed before and counts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import anyio

from asyncdcp.envelope import decode_record, encode_record
from asyncdcp.errors import KeyUnavailable
from asyncdcp.metadata import RECORD_LIMIT, Record
from asyncdcp.names import file_save_id, record_name, record_save_id
from asyncdcp.runs.layout import step_of, term_name
from asyncdcp.runs.saves import saves_of
from asyncdcp.storage import Place, Storage, Survey

_POLL_SECONDS = 0.1


@dataclass
class _Watched:
    """A save without a Record: how it looked, and since when."""

    files: Mapping[str, tuple[int, float]]
    since: float


@dataclass
class Settled:
    """What became of what was in flight: sub-place and save id of each."""

    committed: list[tuple[str, str]] = field(default_factory=list)
    aborted: list[tuple[str, str]] = field(default_factory=list)


async def settle_saves(place: Place, term: int, *, quiet: float, deadline: float) -> Settled:
    """Returns once every save of the run has a Record. ``term`` was claimed just before, by the caller.

    What still moves after ``deadline`` seconds is given up as well. The files of what is given up are deleted.
    """
    begun = time.monotonic()
    watched: dict[tuple[str, str], _Watched] = {}
    settled = Settled()
    clock: float | None = None
    while True:
        before = time.monotonic()  # what passes within a look, as where this process is stopped, nobody has watched
        survey = await place.survey(lambda *_: False, RECORD_LIMIT)
        now = time.monotonic()
        if clock is None:  # what the storage's clock showed when the term was claimed, a moment ago
            clock = survey.own.objects[term_name(term)].modified
        left = unsettled(survey)
        settled.committed += [key for key in watched if key not in left]  # or it has given itself up: no matter
        watched = {key: _seen(watched.get(key), files, clock, now, begun) for key, files in left.items()}
        for key, state in list(watched.items()):
            if before - state.since >= quiet or now - begun >= deadline:
                won = await abort_save(place, *key, cause=f"given up by term {term}: it had not moved for {quiet:g} s")
                (settled.aborted if won else settled.committed).append(key)
                del watched[key]
        if not watched:
            return settled
        await anyio.sleep(_POLL_SECONDS)


def unsettled(survey: Survey) -> dict[tuple[str, str], dict[str, tuple[int, float]]]:
    """The saves without a Record, by sub-place and save id: size and time of change of each file."""
    return {
        (name, save_id): {file: (found.size, found.modified) for file in files if (found := contents.objects[file])}
        for name, contents in survey.children.items()
        if step_of(name) is not None
        for save_id, files in saves_of(contents).items()
        if record_name(save_id) not in files
    }


def _seen(
    before: _Watched | None, files: Mapping[str, tuple[int, float]], clock: float, now: float, begun: float
) -> _Watched:
    if before is not None:
        return before if before.files == files else _Watched(files, now)
    changed = max(modified for _, modified in files.values())
    return _Watched(files, min(begun - (clock - changed), now))


async def abort_save(place: Place, name: str, save_id: str, *, cause: str) -> bool:
    """Gives a save up in its writer's place and deletes its files; False if it had committed before, and counts.

    A Record that is encrypted may be either, so it is taken for a commit: nothing is deleted.
    """
    storage = place.child(name)
    record = Record(save_id=save_id, outcome="abort", time=time.time(), world_size=0, versions={}, cause=cause)
    file = record_name(save_id)
    if not await storage.claim(file, encode_record(record)):
        try:
            return decode_record(await storage.get(file, RECORD_LIMIT), file).outcome == "abort"
        except KeyUnavailable:
            return False
    await delete_files(storage, save_id)
    return True


async def delete_files(storage: Storage, save_id: str) -> None:
    """Deletes every file of a save but its Record."""
    names = await storage.list()
    await storage.delete([name for name in names if file_save_id(name) == save_id and record_save_id(name) is None])
