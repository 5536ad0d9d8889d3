"""verify: reads a whole checkpoint as it is stored, and says all that is wrong with it, not only the first fault.

Checksums are of stored bytes, so neither keys nor extensions are needed. Data is read by large aligned reads, which
pass the page cache where the storage can; several at once.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import anyio
from anyio import to_thread

from asyncdcp.buffers import io_buffer
from asyncdcp.envelope import Unseal
from asyncdcp.errors import AsyncDCPError, CorruptCheckpoint, StorageError, UnsupportedFormat
from asyncdcp.extensions import ExtensionRegistry, Seals
from asyncdcp.format.blocks import SLAB_BYTES, block_count, checksum, unpack_checksums
from asyncdcp.metadata import FileTable, Index, Record
from asyncdcp.names import index_name, record_name, record_save_id
from asyncdcp.pipeline.descriptions import read_listed
from asyncdcp.pipeline.records import choose_commit, read_record
from asyncdcp.pipeline.union import FileMap, enumerated, unite
from asyncdcp.results import Damage, DamageKind, VerifyReport
from asyncdcp.storage.port import ObjectReader, Storage
from asyncdcp.threads import on_thread
from asyncdcp.trace import Trace

__all__ = ["Damage", "VerifyReport", "verify"]

READS_IN_FLIGHT = 4
_BLOCK_LIMIT = SLAB_BYTES + (1 << 20)
"""The most bytes that a block may be stored in: a transform that cannot shrink one may add a little."""


class _Table(NamedTuple):
    """The blocks of a data file as stored: where each begins, and after the last one where that ends."""

    name: str
    size: int
    bounds: Sequence[int]
    checksums: Sequence[int]
    begins: Sequence[int]
    tensors: Sequence[str]
    block_bytes: int

    def tensors_of(self, block: int) -> tuple[str, ...]:
        """What lies in a block, by its place in the decoded file."""
        first = max(bisect.bisect_right(self.begins, block * self.block_bytes) - 1, 0)
        return tuple(self.tensors[first : bisect.bisect_left(self.begins, (block + 1) * self.block_bytes)])


class _Run(NamedTuple):
    """Blocks ``first <= i < last`` of a file, read at once."""

    table: _Table
    first: int
    last: int


async def verify(storage: Storage, trace: Trace, registry: ExtensionRegistry | None = None) -> VerifyReport:
    """Verifies the checkpoint at ``storage``: every Record, its indexes, and every stored byte.

    Damage is reported, not raised. ``CheckpointNotFound`` and ``AmbiguousCheckpoint`` are raised where that is what
    there is, and ``UnsupportedFormat`` for what a newer asyncdcp wrote. ``trace.total`` becomes the bytes to read, and
    spans "verify" count those that were. ``registry`` has keys: with them it is also verified that nothing was changed
    on purpose in Record and indexes, and they are needed (``KeyUnavailable``) only where those are encrypted. A
    checkpoint that is replaced meanwhile is no damage: the new one is verified.
    """
    while True:
        started = time.monotonic()
        pass_ = _Pass(storage, trace, Seals(registry or ExtensionRegistry()))
        record = await pass_.resolve()
        if record is not None:
            await pass_.check(record)
        if not pass_.damages or record is None or not await pass_.is_replaced(record):
            save_id = record.save_id if record else None
            seconds = time.monotonic() - started
            counts = (len(pass_.tables), pass_.blocks, pass_.bytes)
            return VerifyReport(storage.info.location, save_id, *counts, seconds, tuple(pass_.damages))


class _Pass:
    """One look at everything."""

    def __init__(self, storage: Storage, trace: Trace, unseal: Unseal) -> None:
        self._storage = storage
        self._unseal = unseal
        self._trace = trace
        self._limiter = anyio.CapacityLimiter(READS_IN_FLIGHT)
        self.damages: list[Damage] = []
        self.tables: list[_Table] = []
        self.blocks = 0
        self.bytes = 0

    async def resolve(self) -> Record | None:
        """The Record that is the checkpoint; None if a damaged one may be it."""
        records = []
        for name in sorted(await self._storage.list()):
            save_id = record_save_id(name)
            if save_id is None:
                continue
            try:
                records.append(await read_record(self._storage, save_id, self._unseal))
            except FileNotFoundError:  # gone since the listing
                continue
            except UnsupportedFormat:
                raise
            except (CorruptCheckpoint, StorageError) as error:
                self._found("record", name, error)
        if self.damages and not any(record.outcome == "commit" for record in records):
            return None
        return choose_commit(records, self._storage.info.location)

    async def is_replaced(self, record: Record) -> bool:
        """Whether another commit has taken the place of this one by now."""
        now = await _Pass(self._storage, Trace(), self._unseal).resolve()
        return now is not None and now.save_id != record.save_id

    async def check(self, record: Record) -> None:
        """Indexes, then sizes, then bytes."""
        if not 0 < record.world_size == len(record.indexes):
            name = record_name(record.save_id)
            message = f"{name} lists {len(record.indexes)} indexes of {record.world_size} ranks"
            self.damages.append(Damage("record", name, message))
        indexes = await self._indexes(record)
        maps = await self._maps(indexes)
        self.tables = [table for index in indexes for table in self._tables(index, maps)]
        self._trace.total = sum(table.size for table in self.tables)
        sizes = await self._storage.list()
        runs = iter([run for table in self.tables if self._fits(table, sizes) for run in _runs(table)])
        async with anyio.create_task_group() as workers:
            for _ in range(READS_IN_FLIGHT):
                workers.start_soon(self._work, runs)

    async def _indexes(self, record: Record) -> list[Index]:
        found = []
        for rank, ref in enumerate(record.indexes):
            try:
                found.append(await read_listed(self._storage, record, rank, self._unseal))
            except UnsupportedFormat:
                raise
            except (CorruptCheckpoint, StorageError) as error:
                self._found("index", ref.name, error)
        return found

    async def _maps(self, indexes: list[Index]) -> dict[str, FileMap]:
        """What lies where, for messages; empty where the indexes contradict themselves or each other."""
        try:
            return (await to_thread.run_sync(unite, indexes)).files if indexes and not self.damages else {}
        except UnsupportedFormat:
            raise
        except CorruptCheckpoint as error:
            self._found("index", error.path or "", error)
            return {}

    def _tables(self, index: Index, maps: dict[str, FileMap]) -> Iterator[_Table]:
        """The data files of an Index whose numbers make sense."""
        for file, image in zip(index.files, index.plan.images, strict=False):
            bounds = list(_bounds(file, image.size, index.block_bytes))
            known = maps.get(file.name)
            if len(file.checksums) == 8 * (len(bounds) - 1) and bounds[-1] == file.stored_size and _readable(bounds):
                begins, tensors = (known.begins, known.tensors) if known else ([], [])
                checksums = unpack_checksums(file.checksums)
                yield _Table(file.name, file.stored_size, bounds, checksums, begins, tensors, index.block_bytes)
            else:
                name = index_name(index.save_id, index.rank)
                message = f"{name}: its table of the blocks of {file.name[:80]!r} makes no sense"
                self.damages.append(Damage("index", name, message))

    def _fits(self, table: _Table, sizes: dict[str, int]) -> bool:
        size = sizes.get(table.name)
        if size == table.size:
            return True
        what = "is missing" if size is None else f"has {size} bytes"
        message = f"{table.name} {what}, and had {table.size} bytes; it holds {enumerated(table.tensors)}"
        kind: DamageKind = "missing" if size is None else "size"
        self.damages.append(Damage(kind, table.name, message, None, tuple(table.tensors)))
        return False

    async def _work(self, runs: Iterator[_Run]) -> None:
        """Takes runs until there are none. A file is opened for each: that costs little beside reading one."""
        buffer = io_buffer(2 * SLAB_BYTES)
        for run in runs:
            begin, end = run.table.bounds[run.first], run.table.bounds[run.last]
            with self._trace.span("verify", end - begin):
                await self._read(run, buffer)

    async def _read(self, run: _Run, buffer: memoryview) -> None:
        table = run.table
        try:
            source = await self._storage.open(table.name)
            try:
                data = await _stored(source, table.bounds[run.first], table.bounds[run.last], buffer)
            finally:
                await source.aclose()
        except (OSError, EOFError, AsyncDCPError) as error:
            await self._unread(run, buffer, error)
            return
        wrong = await on_thread(self._limiter, _mismatches, run, data)
        self.blocks += run.last - run.first
        self.bytes += len(data)
        for block in wrong:
            place = f"bytes {table.bounds[block]} to {table.bounds[block + 1]} as stored"
            self._block("checksum", table, block, f"block {block} ({place}) does not match its checksum")

    async def _unread(self, run: _Run, buffer: memoryview, error: Exception) -> None:
        """Looks for the blocks that cannot be read, one by one; the others are verified all the same."""
        if run.last - run.first > 1:
            for block in range(run.first, run.last):
                await self._read(_Run(run.table, block, block + 1), buffer)
        else:
            self._block("unreadable", run.table, run.first, f"block {run.first} cannot be read: {error}")

    def _block(self, kind: DamageKind, table: _Table, block: int, what: str) -> None:
        tensors = table.tensors_of(block)
        message = f"{table.name}: {what}; it holds {enumerated(tensors)}"
        self.damages.append(Damage(kind, table.name, message, block, tensors))

    def _found(self, kind: DamageKind, file: str, error: AsyncDCPError) -> None:
        self.damages.append(Damage(kind, file, str(error), None, error.tensors))


def _bounds(file: FileTable, size: int, block_bytes: int) -> Iterator[int]:
    if file.lengths is not None:
        return accumulate(file.lengths, initial=0)
    blocks = block_count(size, block_bytes) if block_bytes > 0 and len(file.checksums) * block_bytes >= size else 0
    return (min(block * block_bytes, size) for block in range(blocks + 1))


def _readable(bounds: Sequence[int]) -> bool:
    """Whether every block fits into the buffer that it is to be read into."""
    return all(0 <= end - begin <= _BLOCK_LIMIT for begin, end in pairwise(bounds))


def _runs(table: _Table) -> Iterator[_Run]:
    """Neighbouring blocks, up to a slab together."""
    first = 0
    for last in range(1, len(table.bounds)):
        full = last + 1 == len(table.bounds) or table.bounds[last + 1] - table.bounds[first] > SLAB_BYTES
        if full:
            yield _Run(table, first, last)
            first = last


async def _stored(source: ObjectReader, begin: int, end: int, buffer: memoryview) -> memoryview:
    """Bytes ``begin <= i < end`` of a file, read by an aligned read around them."""
    start = begin // source.alignment * source.alignment
    length = -(-(end - start) // source.alignment) * source.alignment
    if await source.read(start, [buffer[:length]]) < end - start:
        raise EOFError("the file has become shorter")
    return buffer[begin - start : end - start]


def _mismatches(run: _Run, data: memoryview) -> list[int]:
    bounds, origin = run.table.bounds, run.table.bounds[run.first]
    return [
        block
        for block in range(run.first, run.last)
        if checksum(data[bounds[block] - origin : bounds[block + 1] - origin]) != run.table.checksums[block]
    ]
