"""The Records and indexes of a directory: which Record is the checkpoint, and why a save was given up, in a Record's
words, from an error to them, and back to an error on other ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from anyio import to_thread

from asyncdcp.envelope import Unseal, decode_index, decode_record, digest, trusting
from asyncdcp.errors import (
    AmbiguousCheckpoint,
    AsyncDCPError,
    Cancelled,
    CheckpointNotFound,
    CommitUnknown,
    CorruptCheckpoint,
    InvalidOption,
    KeyUnavailable,
    PeerFailed,
    ReplicaMismatch,
    SaveSkipped,
    StructureChanged,
    UnsupportedFormat,
    plain,
    storage_error,
)
from asyncdcp.metadata import INDEX_LIMIT, RECORD_LIMIT, Index, IndexRef, Record
from asyncdcp.names import index_name, record_name, record_save_id
from asyncdcp.storage.port import Storage

_CAUSE_LIMIT = 100_000
KEYS: Final = "keys"
"""The kind of ``InvalidOption`` for globs that match nothing on any rank."""
_KINDS: dict[type[AsyncDCPError], str] = {
    StructureChanged: "structure",
    ReplicaMismatch: "mismatch",
    SaveSkipped: "skipped",
    Cancelled: "cancelled",
}
"""Errors that are no one rank's, or that others are told by their kind; in an abort's cause before the message."""
_ERRORS: dict[str, type[AsyncDCPError]] = {**{kind: error for error, kind in _KINDS.items()}, KEYS: InvalidOption}


async def read_records(storage: Storage, names: Iterable[str], unseal: Unseal = trusting) -> list[Record]:
    """Every Record among ``names``, in the order of save ids. One that vanished since the listing is passed over."""
    records = []
    for name in sorted(names):
        save_id = record_save_id(name)
        if save_id is None:
            continue
        try:
            records.append(await read_record(storage, save_id, unseal))
        except FileNotFoundError:
            continue
    return records


async def read_record(storage: Storage, save_id: str, unseal: Unseal = trusting) -> Record:
    """The Record of one save; FileNotFoundError if it has none, ``CorruptCheckpoint`` if it is another's."""
    name = record_name(save_id)
    data = await storage.get(name, RECORD_LIMIT)
    if unseal is trusting:
        record = decode_record(data, name)
    else:  # who has the key may have to ask for it
        record = await to_thread.run_sync(decode_record, data, name, unseal)
    if record.save_id != save_id:
        raise CorruptCheckpoint(f"{name}: says it is the Record of save {record.save_id[:40]!r}", path=name)
    if save_id in record.replaces:
        raise CorruptCheckpoint(f"{name}: says that it replaces itself", path=name)
    return record


async def destroyed_records(storage: Storage, names: Iterable[str]) -> list[str]:
    """The save ids of those Records among ``names`` whose bytes are not what was written, whoever has what key. One
    of a format that is not known is none of them, nor one that is encrypted.
    """
    found = []
    for save_id in filter(None, map(record_save_id, sorted(names))):
        try:
            await read_record(storage, save_id)
        except (FileNotFoundError, KeyUnavailable, UnsupportedFormat):
            continue
        except CorruptCheckpoint:
            found.append(save_id)
    return found


class StoredIndex(NamedTuple):
    """An Index, and what a Record says of it."""

    content: Index
    ref: IndexRef


async def read_index(
    storage: Storage, save_id: str, rank: int, limit: int = INDEX_LIMIT, unseal: Unseal = trusting
) -> StoredIndex:
    """The Index of a rank, of at most ``limit`` bytes; ``CorruptCheckpoint`` if it is missing or another's."""
    data, ref = await read_index_bytes(storage, save_id, rank, limit)
    index = await to_thread.run_sync(decode_index, data, ref.name, unseal)
    return StoredIndex(check_index_of(index, save_id, rank), ref)


async def read_index_bytes(
    storage: Storage, save_id: str, rank: int, limit: int = INDEX_LIMIT
) -> tuple[bytes, IndexRef]:
    """The bytes of a rank's Index, not looked at yet."""
    name = index_name(save_id, rank)
    try:
        data = await storage.get(name, min(limit, INDEX_LIMIT))
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"the index {name} is missing", path=name) from error
    return data, IndexRef(name, len(data), digest(data))


def check_index_of(index: Index, save_id: str, rank: int) -> Index:
    """The Index itself, if it is of this save and rank; else ``CorruptCheckpoint``."""
    if (index.save_id, index.rank) != (save_id, rank):
        name = index_name(save_id, rank)
        raise CorruptCheckpoint(f"{name} says it is the index of another save or rank", path=name)
    return index


def live_commits(records: Sequence[Record]) -> list[Record]:
    """The commits that no other commit replaces."""
    commits = [record for record in records if record.outcome == "commit"]
    replaced = {save_id for record in commits for save_id in record.replaces}
    return [record for record in commits if record.save_id not in replaced]


def choose_commit(records: Sequence[Record], location: str) -> Record:
    """The checkpoint of a directory. ``CheckpointNotFound`` where there is none, ``AmbiguousCheckpoint`` where there
    are two, ``CorruptCheckpoint`` where commits replace each other in a circle.
    """
    commits = live_commits(records)
    circle = [record_name(record.save_id) for record in records if record.outcome == "commit"]
    if not commits and circle:
        raise CorruptCheckpoint(
            f"the Records at {location} replace each other in a circle: {circle[:8]}", path=location
        )
    if not commits:
        aborts = [f"rank {record.rank}: {record.cause}" for record in records if record.outcome == "abort"]
        hint = f" (a save was given up: {aborts[-1]})" if aborts else ""
        raise CheckpointNotFound(f"no checkpoint at {location}{hint}", path=location)
    if len(commits) > 1:
        names = ", ".join(record_name(record.save_id) for record in commits)
        raise AmbiguousCheckpoint(
            f"{location} holds {len(commits)} checkpoints that do not know of each other ({names}); "
            "remove the Record of the one you do not want",
            path=location,
        )
    return commits[0]


def kind_of(error: AsyncDCPError) -> str:
    """What an abort calls it."""
    return _KINDS.get(type(error), "failed")


def cause_of(kind: str, error: AsyncDCPError) -> str:
    """What an abort says, whatever the error does: no message may keep a Record from being written. Paths may be in it
    that are not UTF-8, and what others raise may be of any length.
    """
    return plain(f"{kind}: {error}"[:_CAUSE_LIMIT])


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


def commit_unknown(location: str, error: BaseException | None) -> CommitUnknown:
    """Neither a commit nor an abort could be seen to be the save's Record, because of ``error``."""
    why = f" ({error})" if error else ""
    return CommitUnknown(
        f"whether the save to {location} was committed cannot be told; it is there whole, or not at all: load it once "
        f"the storage answers{why}",
        path=location,
    )


def peer_error(record: Record, location: str) -> AsyncDCPError:
    """What a rank raises for another's abort: by its kind where that concerns all ranks alike, else ``PeerFailed``."""
    kind, _, text = (record.cause or "").partition(": ")
    found = _ERRORS.get(kind, PeerFailed)
    if found in (PeerFailed, Cancelled):
        how = "was waited for in vain" if kind == "deadline" else "gave the save up"
        return PeerFailed(f"rank {record.rank} {how}: {record.cause}", path=location, rank=record.rank)
    return found(text, path=location, rank=record.rank)


def abort_record(save_id: str, ranks: tuple[int, int], error: AsyncDCPError, versions: dict[str, str]) -> Record:
    """The abort of a save that did not come to a pipeline. ``ranks`` are this one and how many there are."""
    rank, world_size = ranks
    cause = cause_of(kind_of(error), error)
    return Record(save_id, "abort", time.time(), world_size, versions, rank=rank, cause=cause)
