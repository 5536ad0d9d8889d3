"""What describes a checkpoint, its Record and indexes, as it is read from storage or comes from another rank."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

import msgspec
from anyio import to_thread

from asyncdcp.envelope import Unseal, decode_index, decode_record, encode_record, trusting
from asyncdcp.errors import CorruptCheckpoint, StateMismatch, reading
from asyncdcp.extensions import ExtensionRegistry, Seals
from asyncdcp.metadata import Index, Record
from asyncdcp.names import index_name, record_name
from asyncdcp.pipeline.records import check_index_of, choose_commit, read_index, read_index_bytes, read_records
from asyncdcp.pipeline.union import enumerated
from asyncdcp.storage.port import Storage

T = TypeVar("T")

OtherWorld: TypeAlias = Literal["error", "rank0", "drop"]
"""Whose ``PerRank`` values a rank gets from a checkpoint of another number of ranks."""


@dataclass(frozen=True)
class Viewer:
    """As which of its ranks a checkpoint is read: of ``PerRank`` values each rank gets its own, where the checkpoint
    was saved by as many ranks. Where not, ``otherwise`` says whose.
    """

    rank: int = 0
    world_size: int = 0
    otherwise: OtherWorld = "rank0"

    def looks_as(self, world_size: int, indexes: Sequence[Index], location: str) -> int | None:
        """The rank whose own parts count, None if nobody's do. ``StateMismatch`` if it is not known whose."""
        if world_size == self.world_size:
            return self.rank
        if self.otherwise == "rank0":
            return 0
        own = sorted({name for index in indexes for name in index.plan.own})
        if own and self.otherwise == "error":
            raise StateMismatch(
                f"the checkpoint at {location} was saved by {world_size} ranks and is loaded by {self.world_size}: "
                f"whose {enumerated(own)} (PerRank) is each to get? per_rank='rank0' loads rank 0's everywhere, "
                "per_rank='drop' leaves them as they are",
                path=location,
                mismatched=own,
            )
        return None


class Description(msgspec.Struct):
    """A checkpoint's Record, opened, and its indexes, as they are stored. ``authentic`` says that whoever read the
    Record saw that an encrypting extension vouches for it, ``unseen`` why they could not look.
    """

    record: bytes
    indexes: list[bytes]
    authentic: bool = False
    unseen: str = ""

    def decoded(self, seals: Seals) -> tuple[Record, list[Index]]:
        """Record and indexes, each schema-checked; ``unite`` checks what they say."""
        record = decode_record(self.record, "the Record")
        if self.authentic:
            seals.add(record_name(record.save_id))
        if self.unseen:
            seals.add_unseen(record_name(record.save_id), self.unseen)
        names = [index_name(record.save_id, rank) for rank in range(len(self.indexes))]
        return record, [
            check_index_of(decode_index(data, name, seals), record.save_id, rank)
            for rank, (data, name) in enumerate(zip(self.indexes, names, strict=True))
        ]


async def with_commit(storage: Storage, work: Callable[[Record], Awaitable[T]], unseal: Unseal = trusting) -> T:
    """``work`` with the Record of the checkpoint at ``storage``; once more with the next one, if a new save has just
    replaced what was being read.
    """
    with reading(storage.info.location):
        record = await _resolve(storage, unseal)
        while True:
            try:
                return await work(record)
            except CorruptCheckpoint:
                before, record = record, await _resolve(storage, unseal)
                if record.save_id == before.save_id:
                    raise


async def describe(storage: Storage, registry: ExtensionRegistry | None = None) -> Description:
    """The description of the checkpoint at ``storage``. ``CheckpointNotFound``, ``AmbiguousCheckpoint`` or
    ``CorruptCheckpoint`` where there is none; the indexes are those that the Record lists. ``registry`` has the keys to
    open an encrypted one.
    """
    seals = Seals(registry or ExtensionRegistry())

    async def read(record: Record) -> Description:
        return await read_description(storage, record, seals)

    return await with_commit(storage, read, seals)


async def read_description(storage: Storage, record: Record, seals: Seals) -> Description:
    """The indexes that the Record lists, with it, which was read by ``seals``."""
    name = record_name(record.save_id)
    if not 0 < record.world_size == len(record.indexes):
        raise CorruptCheckpoint(f"{name} lists {len(record.indexes)} indexes of {record.world_size} ranks", path=name)
    indexes = [await _read_listed_bytes(storage, record, rank) for rank in range(record.world_size)]
    return Description(encode_record(record), indexes, authentic=name in seals, unseen=seals.unseen(name))


async def read_listed(storage: Storage, record: Record, rank: int, unseal: Unseal = trusting) -> Index:
    """The Index of a rank, if it is the one that the Record lists."""
    ref = record.indexes[rank]
    found = await read_index(storage, record.save_id, rank, ref.size, unseal)
    if found.ref != ref:
        raise _unlisted(found.ref.name)
    return found.content


async def _read_listed_bytes(storage: Storage, record: Record, rank: int) -> bytes:
    data, found = await read_index_bytes(storage, record.save_id, rank, record.indexes[rank].size)
    if found != record.indexes[rank]:
        await to_thread.run_sync(decode_index, data, found.name)  # what is wrong with it, if that is plain
        raise _unlisted(found.name)
    return data


def _unlisted(name: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"{name} is not the file that the Record lists (its name, size or digest differ)", path=name
    )


async def _resolve(storage: Storage, unseal: Unseal) -> Record:
    return choose_commit(await read_records(storage, await storage.list(), unseal), storage.info.location)
