"""verify: reads a whole checkpoint as it is stored, and says all that is wrong with it, not only the first fault.

Checksums are of stored bytes, so neither keys nor extensions are needed. Data is read by large aligned reads, which
pass the page cache where the storage can; several at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import anyio
from anyio import to_thread

from asyncdcp.envelope import Unseal
from asyncdcp.errors import AsyncDCPError, CorruptCheckpoint, StorageError, StorageUnavailable, UnsupportedFormat
from asyncdcp.extensions import ExtensionRegistry, Seals
from asyncdcp.format.blocks import SLAB_BYTES, checksum
from asyncdcp.metadata import Index, Record
from asyncdcp.names import index_name, record_name, record_save_id
from asyncdcp.pipeline.checking import check_file
from asyncdcp.pipeline.descriptions import read_listed
from asyncdcp.pipeline.records import choose_commit, read_record
from asyncdcp.pipeline.union import FileMap, check_sizes, enumerated, stored_file, unite
from asyncdcp.results import Damage, DamageKind, VerifyReport
from asyncdcp.storage.files import io_buffer
from asyncdcp.storage.port import ObjectReader, Storage
from asyncdcp.threads import on_thread
from asyncdcp.trace import Trace
from asyncdcp.unwinding import all_of

READS_IN_FLIGHT = 4


class _Run(NamedTuple):
    """Blocks ``first <= i < last`` of a file, read at once: bytes ``begin`` to ``end`` as stored."""

    file: FileMap
    first: int
    last: int
    begin: int
    end: int

    @classmethod
    def of(cls, file: FileMap, first: int, last: int) -> _Run:
        return cls(file, first, last, file.bound(first), file.bound(last))


async def verify(storage: Storage, trace: Trace, registry: ExtensionRegistry | None = None) -> VerifyReport:
    """Verifies the checkpoint at ``storage``: every Record, its indexes, and every stored byte.

    Damage is reported, not raised. ``CheckpointNotFound`` and ``AmbiguousCheckpoint`` are raised where that is what
    there is, ``UnsupportedFormat`` for what a newer asyncdcp wrote, and ``StorageUnavailable``. ``trace.total`` becomes
    the bytes to read, and spans "verify" count those that were. ``registry`` has keys: with them it is also verified
    that nothing was changed on purpose in Record and indexes, and they are needed (``KeyUnavailable``) only where those
    are encrypted. A checkpoint that is replaced meanwhile is no damage: the new one is verified.
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
            counts = (len(pass_.files), pass_.blocks, pass_.bytes)
            return VerifyReport(storage.info.location, save_id, *counts, seconds, tuple(pass_.damages))


class _Pass:
    """One look at everything."""

    def __init__(self, storage: Storage, trace: Trace, unseal: Unseal) -> None:
        self._storage = storage
        self._unseal = unseal
        self._trace = trace
        self._limiter = anyio.CapacityLimiter(READS_IN_FLIGHT)
        self.damages: list[Damage] = []
        self.files: list[FileMap] = []
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
            except (UnsupportedFormat, StorageUnavailable):
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
        files = [file for index in indexes for file in self._stored_files(index, maps)]
        sizes = await self._storage.list()
        self.files = [file for file in files if self._fits(file, sizes)]
        self._trace.total = sum(file.stored_size for file in self.files)
        runs = (run for file in self.files for run in _runs(file))
        await all_of(partial(self._work, runs), READS_IN_FLIGHT)

    async def _indexes(self, record: Record) -> list[Index]:
        found = []
        for rank, ref in enumerate(record.indexes):
            try:
                found.append(await read_listed(self._storage, record, rank, self._unseal))
            except (UnsupportedFormat, StorageUnavailable):
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

    def _stored_files(self, index: Index, maps: dict[str, FileMap]) -> Iterator[FileMap]:
        """The data files of an Index; where they are not united, those whose blocks make sense."""
        for number in range(min(len(index.files), len(index.plan.images))):
            found = maps.get(index.files[number].name)
            if found is None:
                try:
                    check_file(index, number)
                except CorruptCheckpoint as error:
                    self._found("index", index_name(index.save_id, index.rank), error)
                    continue
                found = stored_file(index, number)
            yield found

    def _fits(self, file: FileMap, sizes: dict[str, int]) -> bool:
        try:
            check_sizes([file], sizes)
        except CorruptCheckpoint as error:
            self._found("size" if file.name in sizes else "missing", file.name, error)
            return False
        return True

    async def _work(self, runs: Iterator[_Run]) -> None:
        """Takes runs until there are none. A file is opened for each: that costs little beside reading one."""
        buffer = io_buffer(2 * SLAB_BYTES)
        for run in runs:
            with self._trace.span("verify", run.end - run.begin):
                await self._read(run, buffer)

    async def _read(self, run: _Run, buffer: memoryview) -> None:
        file = run.file
        try:
            source = await self._storage.open(file.name)
            try:
                data = await _stored(source, run.begin, run.end, buffer)
            finally:
                await source.aclose()
        except StorageUnavailable:
            raise
        except (OSError, EOFError, AsyncDCPError) as error:
            await self._unread(run, buffer, error)
            return
        wrong = await on_thread(self._limiter, _mismatches, run, data)
        self.blocks += run.last - run.first
        self.bytes += len(data)
        for block in wrong:
            place = f"bytes {file.bound(block)} to {file.bound(block + 1)} as stored"
            self._block("checksum", file, block, f"block {block} ({place}) does not match its checksum")

    async def _unread(self, run: _Run, buffer: memoryview, error: Exception) -> None:
        """Looks for the blocks that cannot be read, one by one; the others are verified all the same."""
        if run.last - run.first > 1:
            for block in range(run.first, run.last):
                await self._read(_Run.of(run.file, block, block + 1), buffer)
        else:
            self._block("unreadable", run.file, run.first, f"block {run.first} cannot be read: {error}")

    def _block(self, kind: DamageKind, file: FileMap, block: int, what: str) -> None:
        tensors = file.tensors_in(block)
        message = f"{file.name}: {what}; it holds {enumerated(tensors)}"
        self.damages.append(Damage(kind, file.name, message, block, tensors))

    def _found(self, kind: DamageKind, file: str, error: AsyncDCPError) -> None:
        self.damages.append(Damage(kind, file, str(error), None, error.tensors))


def _runs(file: FileMap) -> Iterator[_Run]:
    """Neighbouring blocks, up to a slab together, or one; a block is no longer than ``stored_limit``."""
    assert file.checksums is not None
    first, blocks = 0, len(file.checksums)
    for last in range(1, blocks + 1):
        if last == blocks or file.bound(last + 1) - file.bound(first) > SLAB_BYTES:
            yield _Run.of(file, first, last)
            first = last


async def _stored(source: ObjectReader, begin: int, end: int, buffer: memoryview) -> memoryview:
    """Bytes ``begin <= i < end`` of a file, read by an aligned read around them."""
    start = begin // source.alignment * source.alignment
    length = -(-(end - start) // source.alignment) * source.alignment
    if await source.read(start, [buffer[:length]]) < end - start:
        raise EOFError("the file has become shorter")
    return buffer[begin - start : end - start]


def _mismatches(run: _Run, data: memoryview) -> list[int]:
    file = run.file
    assert file.checksums is not None
    return [
        block
        for block in range(run.first, run.last)
        if checksum(data[file.bound(block) - run.begin : file.bound(block + 1) - run.begin]) != file.checksums[block]
    ]
