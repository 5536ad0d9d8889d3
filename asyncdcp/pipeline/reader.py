"""CheckpointReader: opens a checkpoint, checks all that describes it, and reads ranges of its data files, verified.

Data is read in windows of at most a slab, cut at block borders, several in flight. What the page cache has is read
straight into the targets and checksummed there; the rest comes with direct I/O into aligned bounce buffers and is
copied from there once its blocks are verified.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import NamedTuple

import anyio
import xxhash
from anyio import to_thread

from asyncdcp.errors import ChecksumMismatch, CorruptCheckpoint, ungrouped
from asyncdcp.format.blocks import SLAB_BYTES
from asyncdcp.metadata import Index, IndexRef, Metadata, Record, StorageMeta, decode_index, digest
from asyncdcp.names import index_name
from asyncdcp.pipeline.records import choose_commit, read_records
from asyncdcp.pipeline.union import FileMap, unite
from asyncdcp.storage.port import ObjectReader, Storage
from asyncdcp.trace import Trace

READS_IN_FLIGHT = 4
_STRAIGHT_BYTES = 64 << 10
"""Pieces at least this long are read straight to their target where the page cache has them; shorter ones are copied.
"""

Deliver = Callable[[int, memoryview], None]


class ReadRange(NamedTuple):
    """Bytes ``begin <= i < end`` of decoded data file ``file``, and what becomes of them.

    Either ``into`` is a writable memoryview of ``end - begin`` bytes, or ``deliver(offset, data)`` is called, on a
    worker thread, with verified pieces of the range in any order; ``data`` is only good during the call.
    """

    file: str
    begin: int
    end: int
    into: memoryview | None
    deliver: Deliver | None


class _Part(NamedTuple):
    """The part of a range that lies in a window; ``offset`` is where it begins in its range."""

    begin: int
    end: int
    offset: int
    range: ReadRange


class _Window(NamedTuple):
    """A run of whole blocks of a file, ``begin <= i < end``, and the parts wanted of it, in order."""

    file: FileMap
    begin: int
    end: int
    parts: list[_Part]


class CheckpointReader:
    """An open checkpoint. Made by ``open``; an async context manager that closes its files."""

    def __init__(self, storage: Storage, record: Record, metadata: Metadata, files: dict[str, FileMap]) -> None:
        self._storage = storage
        self._files = files
        self._objects: dict[str, ObjectReader] = {}
        self.record = record
        self.metadata = metadata

    @classmethod
    async def open(cls, storage: Storage) -> CheckpointReader:
        """Finds the checkpoint at ``storage`` and checks its Record, its indexes and the sizes of its files.

        ``CheckpointNotFound``, ``AmbiguousCheckpoint``, ``UnsupportedFormat`` or ``CorruptCheckpoint`` otherwise,
        naming file and tensor. No data file is read yet.
        """
        location = storage.info.location
        sizes = await storage.list()
        record = choose_commit(await read_records(storage, sizes), location)
        if len(record.indexes) != record.world_size:
            raise CorruptCheckpoint(
                f"{location}: the Record lists {len(record.indexes)} indexes of {record.world_size} ranks",
                path=location,
            )
        indexes = [await _read_index(storage, record, rank, ref) for rank, ref in enumerate(record.indexes)]
        union = await to_thread.run_sync(unite, indexes)
        for file in union.files.values():
            _check_size(file, sizes)
        meta = StorageMeta(location, record.save_id, record.world_size, record.time, record.metadata)
        first = indexes[0]
        metadata = Metadata(union.tensors, union.storage, meta, first.plan.aliases, first.plan.tree, first.values)
        return cls(storage, record, metadata, union.files)

    async def __aenter__(self) -> CheckpointReader:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the data files; safe to call twice."""
        with anyio.CancelScope(shield=True):
            while self._objects:
                _, opened = self._objects.popitem()
                await opened.aclose()

    async def read(self, ranges: Sequence[ReadRange], trace: Trace) -> None:
        """Reads all ranges. Every byte belongs to a verified block before a range's ``deliver`` sees it.

        ``into`` buffers may hold unverified bytes when this raises ``ChecksumMismatch``. On return and on raise no
        buffer is in use any more.
        """
        for name in {part.file for part in ranges}:
            if name not in self._objects:
                self._objects[name] = await self._open_data(name)
        windows = iter(list(self._windows(ranges)))

        async def work() -> None:
            bounce = memoryview(mmap.mmap(-1, SLAB_BYTES))  # page-aligned; unmapped with the last view of it
            for window in windows:
                await self._read_window(window, bounce, trace)

        with ungrouped():
            async with anyio.create_task_group() as workers:
                for _ in range(READS_IN_FLIGHT):
                    workers.start_soon(work)

    async def _open_data(self, name: str) -> ObjectReader:
        try:
            return await self._storage.open(name)
        except FileNotFoundError as error:
            raise CorruptCheckpoint(f"the data file {name} is missing", path=name) from error

    def _windows(self, ranges: Sequence[ReadRange]) -> Iterator[_Window]:
        """Cuts the ranges, sorted by file and begin, into windows. Blocks that nothing wants are not read."""
        current: _Window | None = None
        for wanted in sorted(ranges, key=lambda part: (part.file, part.begin)):
            file = self._files[wanted.file]
            block = file.block_bytes
            position = wanted.begin
            while position < wanted.end:
                first = position // block * block
                if current is None or current.file is not file or first > current.end:
                    fresh = True
                elif first == current.end:
                    fresh = current.end - current.begin + block > SLAB_BYTES
                else:
                    fresh = False
                if fresh:
                    if current is not None:
                        yield current
                    current = _Window(file, first, first, [])
                assert current is not None
                limit = min(current.begin + max(SLAB_BYTES // block, 1) * block, file.size)
                end = min(wanted.end, limit)
                covered = min(max(current.end, -(-end // block) * block), file.size)
                current.parts.append(_Part(position, end, position - wanted.begin, wanted))
                current = current._replace(end=covered)
                position = end
        if current is not None:
            yield current

    async def _read_window(self, window: _Window, bounce: memoryview, trace: Trace) -> None:
        source = self._objects[window.file.name]
        length = window.end - window.begin
        with trace.span("read", length):
            straight = _straight_parts(window)
            layout = _layout(window, straight, bounce)
            if not await source.read_cached(window.begin, layout):
                straight, layout = [], [bounce[: -(-length // 4096) * 4096]]
                await source.read(window.begin, layout)
        with trace.span("verify", length):
            await to_thread.run_sync(_verify_and_place, window, straight, layout, bounce)


def _straight_parts(window: _Window) -> list[_Part]:
    """The parts that are long, go to memory, and share no byte with another part."""
    chosen: list[_Part] = []
    reach = window.begin
    for part, following in zip(window.parts, [*window.parts[1:], None], strict=True):
        alone = part.begin >= reach and (following is None or following.begin >= part.end)
        if alone and part.range.into is not None and part.end - part.begin >= _STRAIGHT_BYTES:
            chosen.append(part)
        reach = max(reach, part.end)
    return chosen


def _layout(window: _Window, straight: list[_Part], bounce: memoryview) -> list[memoryview]:
    """Buffers that take the whole window: the straight parts' targets, and ``bounce`` for everything between them."""
    buffers: list[memoryview] = []
    position = window.begin
    for part in straight:
        assert part.range.into is not None
        if part.begin > position:
            buffers.append(bounce[position - window.begin : part.begin - window.begin])
        buffers.append(part.range.into[part.offset : part.offset + part.end - part.begin])
        position = part.end
    if position < window.end:
        buffers.append(bounce[position - window.begin : window.end - window.begin])
    return buffers


def _verify_and_place(window: _Window, straight: list[_Part], layout: list[memoryview], bounce: memoryview) -> None:
    """Checks every block of a window, then copies to their targets the parts that are not there yet, and delivers the
    rest.
    """
    _verify(window, layout)
    there = set(map(id, straight))
    for part in window.parts:
        into = part.range.into
        data = bounce[part.begin - window.begin : part.end - window.begin]
        if into is None:
            assert part.range.deliver is not None
            part.range.deliver(part.offset, data)
        elif id(part) not in there:
            _copy(into[part.offset : part.offset + len(data)], data)


def _verify(window: _Window, layout: list[memoryview]) -> None:
    file = window.file
    pieces = iter(layout)
    piece = next(pieces)
    for begin in range(window.begin, window.end, file.block_bytes):
        missing = min(file.block_bytes, window.end - begin)
        hasher = xxhash.xxh3_64()
        while missing:
            if not len(piece):
                piece = next(pieces)
            taken = min(missing, len(piece))
            hasher.update(piece[:taken])
            piece = piece[taken:]
            missing -= taken
        block = begin // file.block_bytes
        if hasher.intdigest() != file.checksums[block]:
            raise _mismatch(file, block)


def _mismatch(file: FileMap, block: int) -> ChecksumMismatch:
    begin = block * file.block_bytes
    first = max(bisect.bisect_right(file.begins, begin) - 1, 0)
    last = bisect.bisect_left(file.begins, begin + file.block_bytes)
    tensors = file.tensors[first:last]
    shown = ", ".join(tensors[:5]) + (" …" if len(tensors) > 5 else "") or "only the header"
    return ChecksumMismatch(
        f"{file.name}: block {block} (bytes {begin} to {min(begin + file.block_bytes, file.size)}) does not match its "
        "checksum; "
        f"it holds {shown}. Tensors loaded in place may be partly written",
        path=file.name,
        block=block,
        tensors=tensors,
    )


def _copy(target: memoryview, source: memoryview) -> None:
    """Long copies by memmove, which releases the GIL; a memoryview's slice assignment holds it, and costs less for
    short ones.
    """
    if len(target) < _STRAIGHT_BYTES:
        target[:] = source
    else:
        ctypes.memmove(_address(target), _address(source), len(target))


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


async def _read_index(storage: Storage, record: Record, rank: int, ref: IndexRef) -> Index:
    name = index_name(record.save_id, rank)
    if ref.name != name:
        raise CorruptCheckpoint(f"the index of rank {rank} cannot be named {ref.name[:80]!r}", path=name)
    try:
        data = await storage.get(name, ref.size)
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"the index {name} is missing", path=name) from error
    if len(data) != ref.size or digest(data) != ref.digest:
        raise CorruptCheckpoint(f"{name} is not the file that the Record lists (size or digest differ)", path=name)
    index = await to_thread.run_sync(decode_index, data, name)
    if (index.save_id, index.rank) != (record.save_id, rank):
        raise CorruptCheckpoint(f"{name} says it is the index of another save or rank", path=name)
    return index


def _check_size(file: FileMap, sizes: dict[str, int]) -> None:
    if file.name not in sizes:
        raise CorruptCheckpoint(f"the data file {file.name} is missing", path=file.name, tensors=file.tensors)
    if sizes[file.name] != file.size:
        raise CorruptCheckpoint(
            f"the data file {file.name} has {sizes[file.name]} bytes, and its index says {file.size}",
            path=file.name,
            tensors=file.tensors,
        )
