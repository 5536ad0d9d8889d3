"""What a save and a load come to, in numbers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from asyncdcp.trace import Span


@dataclass(frozen=True)
class SaveResult:
    """A committed, durable save. Times are in seconds, from the call of ``save`` where nothing else is said."""

    path: str
    save_id: str
    tensors: int
    tensor_bytes: int
    stored_bytes: int
    """In data files: tensors, headers, after transforms."""
    staged_seconds: float
    """Until the tensors could be changed again."""
    durable_seconds: float
    """Until the checkpoint would have survived a loss of power."""
    stage_seconds: Mapping[str, float]
    """Per stage (stage, transform, write, sync, commit): from its first begin to its last end. Not to be changed."""
    filesystem: str
    replaced: tuple[str, ...] = ()
    """Save ids of the checkpoints at the same path that this one took the place of."""
    spans: tuple[Span, ...] = field(default=(), repr=False)
    """What ran when, for ``trace.chrome_trace``; on the clock of ``time.monotonic``."""

    @property
    def bytes_per_second(self) -> float:
        """Tensor bytes made durable per second."""
        return self.tensor_bytes / max(self.durable_seconds, 1e-9)


PerRankOutcome: TypeAlias = Literal["own", "rank0", "dropped"]


@dataclass(frozen=True)
class LoadReport:
    """A finished load; at the ``report`` of its future. Times in seconds."""

    path: str
    save_id: str
    tensors: int
    read_bytes: int
    """Of tensors, by this rank; blocks at the borders of what was wanted may have cost some more."""
    seconds: float
    stage_seconds: Mapping[str, float]
    received_bytes: int = 0
    """Of tensors, that other ranks have read and passed on (``replicas="broadcast"``)."""
    per_rank: Mapping[str, PerRankOutcome] = field(default_factory=dict)
    """What became of the checkpoint's ``PerRank`` values, by FQN: "own", this rank's as it had saved them; of another
    number of ranks "rank0", rank 0's, or "dropped", not loaded, as ``load(per_rank=…)`` says. What the load was not
    asked for (``keys``, ``strict=False``) is not listed."""
    missing: tuple[str, ...] = ()
    """FQNs of the state that were asked for and are as they were, since the checkpoint lacks them. Only with
    ``strict=False`` is there any; tied tensors are not, where one of their names is there."""
    unexpected: tuple[str, ...] = ()
    """FQNs of the checkpoint, as ``rename`` makes them, that ``keys`` let through and that have no place in the state:
    with ``strict=False``, or on one of several ranks, of which another may hold them."""

    @property
    def bytes_per_second(self) -> float:
        """Bytes read or received, verified and delivered per second."""
        return (self.read_bytes + self.received_bytes) / max(self.seconds, 1e-9)


DamageKind = Literal["record", "index", "missing", "size", "checksum", "unreadable"]


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong with a checkpoint.

    ``block`` is the number of a block of the data file ``file``, None where the whole file is meant; ``tensors`` are
    the FQNs of what lies there, as far as they are known.
    """

    kind: DamageKind
    file: str
    message: str
    block: int | None = None
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class VerifyReport:
    """What ``verify`` found. ``files``, ``blocks`` and ``bytes`` count the data that was read; ``seconds`` is the time.

    ``save_id`` is None where damage hides which commit is the checkpoint.
    """

    path: str
    save_id: str | None
    files: int
    blocks: int
    bytes: int
    seconds: float
    damages: tuple[Damage, ...]

    @property
    def ok(self) -> bool:
        """Whether every byte is as it was written."""
        return not self.damages


class Progress(NamedTuple):
    """How far a save or load has come: ``done`` of ``total`` bytes have passed ``stage``.

    A save passes "stage" and "write", and counts the bytes of its data files, headers too; a load passes "verify". Per
    stage ``done`` only grows, and the last report of one that was not cut short has ``done == total``.
    """

    stage: str
    done: int
    total: int


PROGRESS_STAGES = ("stage", "write", "verify")


class ProgressMeter:
    """A trace's listener: adds up the bytes of the stages that a person wants to see, and reports by stage. May be
    called from any thread; a report must not block.
    """

    def __init__(self, reports: Mapping[str, Callable[[Progress], object]]) -> None:
        self._reports = reports
        self._done = dict.fromkeys(reports, 0)
        self._lock = threading.Lock()

    def __call__(self, span: Span, total: int) -> None:
        report = self._reports.get(span.stage)
        if report is None or not span.bytes:
            return
        with self._lock:  # reported under it, so that no report overtakes another
            done = self._done[span.stage] = self._done[span.stage] + span.bytes
            report(Progress(span.stage, min(done, total), total))


def frozen(mapping: Mapping[str, float]) -> Mapping[str, float]:
    """A copy that types alone keep from being changed: a mappingproxy could be neither pickled nor given to
    ``dataclasses.asdict``.
    """
    return dict(mapping)
