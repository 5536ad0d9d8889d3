"""The checkpoints of a run, from names, sizes and Records alone: no index and no data is read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import msgspec
from anyio import to_thread

from asyncdcp.envelope import Unseal
from asyncdcp.errors import CorruptCheckpoint, InvalidOption, KeyUnavailable
from asyncdcp.extensions import ExtensionRegistry, Seals
from asyncdcp.metadata import RECORD_LIMIT, Record, Summary
from asyncdcp.names import index_name, record_name, record_save_id
from asyncdcp.runs.layout import UNCLAIMED, Line, LineStart, current_line, decode_line, line_term_of, step_of, term_of
from asyncdcp.runs.saves import Outcomes, read_outcomes, saves_of
from asyncdcp.storage import Contents, Place, Survey, open_place

State: TypeAlias = Literal["committed", "partial", "aborted", "damaged", "encrypted"]
Mode: TypeAlias = Literal["min", "max"]


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A step of a run as a listing shows it.

    ``committed``: there whole, as far as its Record and the sizes of its files tell. ``damaged``: committed, but the
    Record cannot be read, files are missing or too short, or two saves claim the place; ``cause`` says which.
    ``partial``: begun, and neither committed nor given up, now under way or cut off. ``aborted``: given up, for
    ``cause``. ``encrypted``: with hidden metadata, and a key that is not at hand; ``cause`` names it. ``size`` is in
    bytes, of all files of the save; ``time`` seconds since the epoch. Of a commit alone: ``term``, ``parent`` (a save
    id), ``metrics``, ``metadata``, ``summary``. ``on_line`` is whether it counts for the run as it stands (see
    layout.py).
    """

    name: str
    step: int
    state: State
    on_line: bool = False
    save_id: str | None = None
    size: int = 0
    ranks: int = 0
    time: float = 0.0
    term: int = UNCLAIMED
    parent: str | None = None
    metrics: dict[str, float | None] = {}
    metadata: dict[str, Any] = {}
    summary: Summary | None = None
    versions: dict[str, str] = {}
    cause: str | None = None

    @property
    def good(self) -> bool:
        """Whether it is committed and on the run's line: one that ``latest`` may name."""
        return self.state == "committed" and self.on_line


@dataclass(frozen=True)
class Run:
    """A run as one look at it shows it. ``term`` is the newest that was claimed, 0 where none was.

    ``checkpoints`` are in the order of steps, of the same step in that of terms; a save that a commit has replaced is
    not among them. ``outcomes`` are those of its steps' sub-places, by name.
    """

    location: str
    term: int
    line: Line
    checkpoints: tuple[Checkpoint, ...]
    survey: Survey
    outcomes: Mapping[str, Outcomes]

    def good(self) -> list[Checkpoint]:
        """The committed checkpoints on the line, oldest step first."""
        return [checkpoint for checkpoint in self.checkpoints if checkpoint.good]

    def steps(self) -> list[int]:
        """Their steps."""
        return [checkpoint.step for checkpoint in self.good()]

    def latest(self) -> Checkpoint | None:
        """The newest good one; derived from what is committed, so there is no pointer that could be stale.

        ``KeyUnavailable`` where that cannot be told, since one that may be newer is encrypted.
        """
        sealed = self.sealed_beyond()
        if sealed is not None:
            raise KeyUnavailable(
                f"the latest checkpoint of {self.location} is not known: {sealed.name} may be it, but {sealed.cause}. "
                "Without that key, use another directory for the run, or take that folder away",
                path=self.location,
            )
        return self._newest()

    def is_checkpoint(self) -> bool:
        """Whether the place is a checkpoint's, and there is nothing of a run in it."""
        return not self.checkpoints and not self.term and any(map(record_save_id, self.survey.own.objects))

    def refuse_checkpoint(self) -> None:
        """``InvalidOption`` where ``is_checkpoint``: taken for a run, it would be one with nothing to resume from."""
        if self.is_checkpoint():
            raise InvalidOption(
                f"{self.location} is a checkpoint, and no run: give the folder that it is in, or another; a single "
                "checkpoint is loaded by AsyncCheckpointer.load"
            )

    def known_latest(self) -> Checkpoint | None:
        """``latest`` for those who only show it; None where it cannot be told, too."""
        return None if self.sealed_beyond() else self._newest()

    def sealed_beyond(self) -> Checkpoint | None:
        """The newest encrypted one that may be newer than any that can be read; None where there is none."""
        newest = self._newest()
        sealed = [each for each in self.checkpoints if each.state == "encrypted"]
        return next((each for each in reversed(sealed) if newest is None or each.step >= newest.step), None)

    def _newest(self) -> Checkpoint | None:
        good = self.good()
        return good[-1] if good else None

    def find(self, step: int) -> Checkpoint | None:
        """The good checkpoint of a step."""
        found = [checkpoint for checkpoint in self.good() if checkpoint.step == step]
        return found[-1] if found else None

    def best(self, metric: str, mode: Mode = "min") -> Checkpoint | None:
        """The good one whose ``metric`` is the least (or greatest); of equals the newest. None where none has it."""
        ranked = by_metric(self.good(), metric, mode)
        return ranked[0] if ranked else None


def by_metric(checkpoints: Iterable[Checkpoint], metric: str, mode: Mode) -> list[Checkpoint]:
    """Those that have the metric as a finite number, the best first, of equals the newest first."""
    if mode not in ("min", "max"):
        raise InvalidOption(f"mode takes 'min' or 'max', not {mode!r}")
    sign = 1 if mode == "min" else -1
    ranked = []
    for checkpoint in checkpoints:
        value = checkpoint.metrics.get(metric)
        if value is not None and math.isfinite(value):
            ranked.append((sign * value, -checkpoint.step, checkpoint))
    ranked.sort(key=lambda row: row[:2])
    return [checkpoint for *_, checkpoint in ranked]


class Known:
    """Records that were read before, so that another look at a run reads only new ones. A Record never changes; one
    that is damaged may be replaced, and is read each time.
    """

    def __init__(self) -> None:
        self._bytes: dict[tuple[str, str], bytes] = {}

    def selects(self, child: str, name: str) -> bool:
        """Whether a survey is to read this object."""
        if (child, name) in self._bytes:
            return False
        if not child:
            return line_term_of(name) is not None
        return step_of(child) is not None and record_save_id(name) is not None

    def complete(self, survey: Survey) -> None:
        """Adds to a survey what it passed over, keeps what it read, and forgets what is gone."""
        before, self._bytes = self._bytes, {}
        for child, contents in (("", survey.own), *survey.children.items()):
            for name in contents.objects:
                data = contents.read.get(name, before.get((child, name)))
                if data is not None:
                    contents.read[name] = self._bytes[child, name] = data

    def forget_damaged(self, outcomes: Mapping[str, Outcomes]) -> None:
        """Keeps no Record that could not be read."""
        for child, found in outcomes.items():
            for save_id in found.broken:
                self._bytes.pop((child, record_name(save_id)), None)


async def look(place: Place, known: Known | None = None, registry: ExtensionRegistry | None = None) -> Run:
    """Lists a run. ``known`` saves reading the same Records again; ``registry`` has the keys of those that are
    encrypted, by default those of the environment.
    """
    known = known or Known()
    survey = await place.survey(known.selects, RECORD_LIMIT)
    known.complete(survey)
    seals = Seals(registry or ExtensionRegistry())
    run = await to_thread.run_sync(describe, place.storage.info.location, survey, seals)  # a key may be asked for
    known.forget_damaged(run.outcomes)
    return run


async def list_checkpoints(
    run: str | os.PathLike[str] | Place, registry: ExtensionRegistry | None = None
) -> list[Checkpoint]:
    """Every step of the run in a directory (a path, a ``file://`` URL or a ``Place``), committed or not. ``registry``
    has the keys of checkpoints with hidden metadata, by default those of the environment.
    """
    return list((await look(open_place(run), registry=registry)).checkpoints)


def describe(location: str, survey: Survey, unseal: Unseal) -> Run:
    """A run, from what a survey found. ``CorruptCheckpoint`` if its newest line cannot be read: nothing is guessed."""
    steps = {name: step for name in survey.children if (step := step_of(name)) is not None}
    outcomes = {name: read_outcomes(survey.children[name], unseal) for name in steps}
    unlined = [
        checkpoint
        for name, step in steps.items()
        for checkpoint in _checkpoints(name, step, survey.children[name], outcomes[name])
    ]
    line = current_line(_starts(location, survey.own), (checkpoint.term for checkpoint in unlined))
    placed = [
        msgspec.structs.replace(checkpoint, on_line=line.holds(checkpoint.term, checkpoint.step))
        if checkpoint.save_id is not None and checkpoint.state in ("committed", "damaged")
        else checkpoint
        for checkpoint in unlined
    ]
    placed.sort(key=lambda checkpoint: (checkpoint.step, checkpoint.term, checkpoint.time, checkpoint.name))
    term = max((number for name in survey.own.objects if (number := term_of(name)) is not None), default=UNCLAIMED)
    return Run(location, term, line, tuple(placed), survey, outcomes)


def _starts(location: str, own: Contents) -> list[LineStart]:
    """The newest line's start; those before it count for nothing."""
    terms = {number: name for name in own.objects if (number := line_term_of(name)) is not None}
    if not terms:
        return []
    newest = max(terms)
    name = terms[newest]
    path = f"{location}/{name}"
    if name not in own.read:
        raise CorruptCheckpoint(f"{path} cannot be read: {own.unread.get(name)}", path=path)
    start = decode_line(own.read[name], path)
    if start.term != newest:
        raise CorruptCheckpoint(f"{path} says it is the line of term {start.term}", path=path)
    return [start]


def _checkpoints(name: str, step: int, contents: Contents, outcomes: Outcomes) -> list[Checkpoint]:
    """What a step's sub-place comes to: its live commits, and what cannot be read; else what was not committed."""
    if "" in contents.unread:
        return [Checkpoint(name=name, step=step, state="damaged", cause=contents.unread[""])]
    saves = saves_of(contents)
    live = outcomes.live
    terms = [record.term for record in live]
    found = [_committed(name, step, record, saves[record.save_id], terms) for record in live]
    states: tuple[tuple[State, dict[str, str]], ...] = (("damaged", outcomes.broken), ("encrypted", outcomes.sealed))
    replaced = outcomes.replaced
    for state, causes in states:
        for save_id, cause in causes.items():
            if save_id in replaced:
                continue
            size = sum(saves[save_id].values())
            found.append(Checkpoint(name=name, step=step, state=state, save_id=save_id, size=size, cause=cause))
    return found or _uncommitted(name, step, saves, outcomes.records)


def _committed(
    name: str, step: int, record: Record, files: Mapping[str, int], terms: Sequence[int | None]
) -> Checkpoint:
    cause = _damage(record, files)
    if terms.count(record.term) > 1:
        cause = "two saves that do not know of each other committed here; remove the Record of the one you do not want"
    return Checkpoint(
        name=name,
        step=step,
        state="damaged" if cause else "committed",
        save_id=record.save_id,
        size=sum(files.values()),
        ranks=record.world_size,
        time=record.time,
        term=UNCLAIMED if record.term is None else record.term,
        parent=record.parent,
        metrics=record.metrics,
        metadata=record.metadata,
        summary=record.summary,
        versions=record.versions,
        cause=cause,
    )


def _damage(record: Record, files: Mapping[str, int]) -> str | None:
    """What the sizes of its files show to be wrong with a commit; None for nothing."""
    if not 0 < record.world_size == len(record.indexes):
        return f"its Record lists {len(record.indexes)} indexes of {record.world_size} ranks"
    for ref in record.indexes:
        if files.get(ref.name) != ref.size:
            return f"{ref.name} is missing" if ref.name not in files else f"{ref.name} has not the size that was saved"
    indexes = {index_name(record.save_id, rank) for rank in range(record.world_size)}
    data = sum(size for name, size in files.items() if name not in indexes and name != record_name(record.save_id))
    stored = record.summary.stored_bytes if record.summary else 0
    return f"{stored - data} bytes of its data files are missing" if data < stored else None


def _uncommitted(
    name: str, step: int, saves: Mapping[str, Mapping[str, int]], records: Mapping[str, Record]
) -> list[Checkpoint]:
    begun = {save_id: files for save_id, files in saves.items() if save_id not in records}
    aborts = [record for record in records.values() if record.outcome == "abort"]
    if begun:
        save_id = min(begun)
        size = sum(sum(files.values()) for files in begun.values())
        return [Checkpoint(name=name, step=step, state="partial", save_id=save_id, size=size)]
    if not aborts:
        return []
    last = max(aborts, key=lambda record: record.time)
    return [
        Checkpoint(
            name=name,
            step=step,
            state="aborted",
            save_id=last.save_id,
            size=sum(saves[last.save_id].values()),
            ranks=last.world_size,
            time=last.time,
            cause=last.cause if last.rank is None else f"rank {last.rank}: {last.cause}",
        )
    ]
