"""The Records and indexes of a directory, and which Record is the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from anyio import to_thread

from asyncdcp.envelope import Unseal, decode_index, decode_record, digest, trusting
from asyncdcp.errors import (
    AmbiguousCheckpoint,
    CheckpointNotFound,
    CorruptCheckpoint,
    KeyUnavailable,
    UnsupportedFormat,
)
from asyncdcp.metadata import INDEX_LIMIT, RECORD_LIMIT, Index, IndexRef, Record
from asyncdcp.names import index_name, record_name, record_save_id
from asyncdcp.storage.port import Storage


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
