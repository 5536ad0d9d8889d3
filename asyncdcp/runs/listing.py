"""The checkpoints of a run, from names, sizes and Records alone: no index and no data is read."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import msgspec

from asyncdcp.errors import CorruptCheckpoint, InvalidOption
from asyncdcp.metadata import RECORD_LIMIT, Record, Summary, decode_record
from asyncdcp.names import file_save_id, index_name, record_name, record_save_id
from asyncdcp.runs.layout import LineStart, decode_line, line_term_of, step_of, term_of
from asyncdcp.runs.lineage import UNCLAIMED, Line, current_line
from asyncdcp.storage import Contents, Place, Survey, open_place

State: TypeAlias = Literal["committed", "partial", "aborted", "damaged"]
Mode: TypeAlias = Literal["min", "max"]


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A step of a run as a listing shows it.

    ``committed``: there whole, as far as its Record and the sizes of its files tell. ``damaged``: committed, but the
    Record cannot be read, files are missing or too short, or two saves claim the place; ``cause`` says which.
    ``partial``: begun, and neither committed nor given up, now under way or cut off. ``aborted``: given up, for
    ``cause``. ``size`` is in bytes, of all files of the save; ``time`` seconds since the epoch. Of a commit alone:
    ``term``, ``parent`` (a save id), ``metrics``, ``metadata``, ``summary``. ``on_line`` is whether it counts for the
    run as it stands (see lineage.py).
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
    not among them.
    """

    location: str
    term: int
    line: Line
    checkpoints: tuple[Checkpoint, ...]
    survey: Survey

    def good(self) -> list[Checkpoint]:
        """The committed checkpoints on the line, oldest step first."""
        return [checkpoint for checkpoint in self.checkpoints if checkpoint.good]

    def steps(self) -> list[int]:
        """Their steps."""
        return [checkpoint.step for checkpoint in self.good()]

    def latest(self) -> Checkpoint | None:
        """The newest good one; derived from what is committed, so there is no pointer that could be stale."""
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
    """Records that were read before, so that another look at a run reads only new ones. A Record never changes."""

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


async def look(place: Place, known: Known | None = None) -> Run:
    """Lists a run. ``known`` saves reading the same Records again."""
    known = known or Known()
    survey = await place.survey(known.selects, RECORD_LIMIT)
    known.complete(survey)
    return describe(place.storage.info.location, survey)


async def list_checkpoints(run: str | os.PathLike[str] | Place) -> list[Checkpoint]:
    """Every step of the run in a directory (a path, a ``file://`` URL or a ``Place``), committed or not."""
    return list((await look(open_place(run))).checkpoints)


def describe(location: str, survey: Survey) -> Run:
    """A run, from what a survey found. ``CorruptCheckpoint`` if its newest line cannot be read: nothing is guessed."""
    unlined = [
        checkpoint
        for name, contents in survey.children.items()
        if (step := step_of(name)) is not None
        for checkpoint in _checkpoints(name, step, contents)
    ]
    line = current_line(_starts(survey.own), (checkpoint.term for checkpoint in unlined))
    placed = [
        msgspec.structs.replace(checkpoint, on_line=line.holds(checkpoint.term, checkpoint.step))
        if checkpoint.save_id is not None and checkpoint.state in ("committed", "damaged")
        else checkpoint
        for checkpoint in unlined
    ]
    placed.sort(key=lambda checkpoint: (checkpoint.step, checkpoint.term, checkpoint.time, checkpoint.name))
    term = max((number for name in survey.own.objects if (number := term_of(name)) is not None), default=UNCLAIMED)
    return Run(location, term, line, tuple(placed), survey)


def _starts(own: Contents) -> list[LineStart]:
    """The newest line's start; those before it count for nothing."""
    terms = {number: name for name in own.objects if (number := line_term_of(name)) is not None}
    if not terms:
        return []
    newest = max(terms)
    name = terms[newest]
    if name not in own.read:
        raise CorruptCheckpoint(f"{name} cannot be read: {own.unread.get(name)}", path=name)
    start = decode_line(own.read[name], name)
    if start.term != newest:
        raise CorruptCheckpoint(f"{name} says it is the line of term {start.term}", path=name)
    return [start]


def saves_of(contents: Contents) -> dict[str, dict[str, int]]:
    """The files of each save in a sub-place: names and bytes, by save id."""
    saves: dict[str, dict[str, int]] = defaultdict(dict)
    for name, found in contents.objects.items():
        save_id = file_save_id(name)
        if save_id is not None:
            saves[save_id][name] = found.size
    return dict(saves)


def read_outcomes(contents: Contents) -> tuple[dict[str, Record], dict[str, str]]:
    """The Records of a sub-place by save id; and of those that cannot be read, why."""
    records, broken = {}, {}
    for name in contents.objects:
        save_id = record_save_id(name)
        if save_id is None:
            continue
        try:
            record = decode_record(contents.read[name], name)
        except KeyError:
            broken[save_id] = contents.unread.get(name, f"{name} was not read")
        except CorruptCheckpoint as error:
            broken[save_id] = str(error)
        else:
            records[save_id] = record
            if record.save_id != save_id:
                del records[save_id]
                broken[save_id] = f"{name}: says it is the Record of save {record.save_id[:40]!r}"
    return records, broken


def live_records(records: Mapping[str, Record]) -> list[Record]:
    """The commits that no other commit replaces."""
    commits = [record for record in records.values() if record.outcome == "commit"]
    replaced = {save_id for record in commits for save_id in record.replaces}
    return [record for record in commits if record.save_id not in replaced]


def _checkpoints(name: str, step: int, contents: Contents) -> list[Checkpoint]:
    """What a step's sub-place comes to: its live commits; else that it is damaged, under way, or given up."""
    if "" in contents.unread:
        return [Checkpoint(name=name, step=step, state="damaged", cause=contents.unread[""])]
    saves = saves_of(contents)
    records, broken = read_outcomes(contents)
    live = live_records(records)
    terms = [record.term for record in live]
    found = [_committed(name, step, record, saves[record.save_id], terms) for record in live]
    found += [
        Checkpoint(
            name=name, step=step, state="damaged", save_id=save_id, size=sum(saves[save_id].values()), cause=cause
        )
        for save_id, cause in broken.items()
    ]
    return found or _uncommitted(name, step, saves, records)


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
