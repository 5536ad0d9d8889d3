"""Why a save was given up, in the words of its Record: from an error to them, and back to an error on other ranks."""

from __future__ import annotations

import time

from asyncdcp.errors import (
    AsyncDCPError,
    Cancelled,
    CommitUnknown,
    PeerFailed,
    ReplicaMismatch,
    SaveSkipped,
    StructureChanged,
    storage_error,
)
from asyncdcp.metadata import Record

_CAUSE_LIMIT = 100_000

_KINDS: dict[type[AsyncDCPError], str] = {
    StructureChanged: "structure",
    ReplicaMismatch: "mismatch",
    SaveSkipped: "skipped",
    Cancelled: "cancelled",
}
"""Errors that are no one rank's, or that others are told by their kind; in an abort's cause before the message."""


def kind_of(error: AsyncDCPError) -> str:
    """What an abort calls it."""
    return _KINDS.get(type(error), "failed")


def cause_of(kind: str, error: AsyncDCPError) -> str:
    """What an abort says, whatever the error does: no message may keep a Record from being written. Paths may be in it
    that are not UTF-8, and what others raise may be of any length.
    """
    return f"{kind}: {error}"[:_CAUSE_LIMIT].encode("utf-8", "backslashreplace").decode()


def known_error(error: Exception, location: str) -> AsyncDCPError:
    """The error itself, or one of ours that carries it as its cause."""
    if isinstance(error, AsyncDCPError):
        return error
    message = f"the save to {location} failed: {type(error).__name__}: {error}"
    if isinstance(error, OSError):
        known: AsyncDCPError = storage_error(message, location, error.errno)
    else:
        known = AsyncDCPError(message, path=location)
    known.__cause__ = error
    return known


def commit_unknown(location: str) -> CommitUnknown:
    """Neither a commit nor an abort could be seen to be the save's Record."""
    return CommitUnknown(
        f"whether the save to {location} was committed cannot be told; it is there whole, or not at all: load it once "
        "the storage answers",
        path=location,
    )


def peer_error(record: Record, location: str) -> AsyncDCPError:
    """What a rank raises for another's abort: by its kind where that concerns all ranks alike, else ``PeerFailed``."""
    kind, _, text = (record.cause or "").partition(": ")
    found = next((error for error, known in _KINDS.items() if known == kind), PeerFailed)
    if found in (PeerFailed, Cancelled):
        how = "was waited for in vain" if kind == "deadline" else "gave the save up"
        return PeerFailed(f"rank {record.rank} {how}: {record.cause}", path=location, rank=record.rank)
    return found(text, path=location, rank=record.rank)


def abort_record(save_id: str, ranks: tuple[int, int], error: AsyncDCPError, versions: dict[str, str]) -> Record:
    """The abort of a save that did not come to a pipeline. ``ranks`` are this one and how many there are."""
    rank, world_size = ranks
    cause = cause_of(kind_of(error), error)
    return Record(save_id, "abort", time.time(), world_size, versions, rank=rank, cause=cause)
