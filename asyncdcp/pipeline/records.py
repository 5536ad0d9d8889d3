"""The Records of a directory, and which of them is the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from asyncdcp.errors import AmbiguousCheckpoint, CheckpointNotFound, CorruptCheckpoint
from asyncdcp.metadata import RECORD_LIMIT, Record, decode_record
from asyncdcp.names import record_name, record_save_id
from asyncdcp.storage.port import Storage


async def read_records(storage: Storage, names: Iterable[str]) -> list[Record]:
    """Every Record among ``names``, in the order of save ids. One that vanished since the listing is passed over."""
    records = []
    for name in sorted(names):
        save_id = record_save_id(name)
        if save_id is None:
            continue
        try:
            records.append(await read_record(storage, save_id))
        except FileNotFoundError:
            continue
    return records


async def read_record(storage: Storage, save_id: str) -> Record:
    """The Record of one save; FileNotFoundError if it has none, ``CorruptCheckpoint`` if it is another's."""
    name = record_name(save_id)
    record = decode_record(await storage.get(name, RECORD_LIMIT), name)
    if record.save_id != save_id:
        raise CorruptCheckpoint(f"{name}: says it is the Record of save {record.save_id[:40]!r}", path=name)
    return record


def live_commits(records: Sequence[Record]) -> list[Record]:
    """The commits that no other commit replaces."""
    commits = [record for record in records if record.outcome == "commit"]
    replaced = {save_id for record in commits for save_id in record.replaces if save_id != record.save_id}
    return [record for record in commits if record.save_id not in replaced]


def choose_commit(records: Sequence[Record], location: str) -> Record:
    """The checkpoint of a directory. ``CheckpointNotFound`` where there is none, ``AmbiguousCheckpoint`` where there
    are two.
    """
    commits = live_commits(records)
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
