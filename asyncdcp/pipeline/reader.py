"""CheckpointReader: opens a checkpoint, checks all that describes it, and reads ranges of its data files, verified.

``RangeReader`` below it does the reading, of any files whose lengths are known: readers of other formats use it too.

Data is read in windows of at most a slab, cut at block borders, several in flight. What the page cache has is read
straight into the targets and checksummed there; the rest comes with direct I/O into aligned bounce buffers and is
copied from there once its blocks are verified. Blocks that extensions transformed are verified as they are stored,
decoded one at a time, and copied from there.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

import anyio
from anyio import to_thread

from asyncdcp.errors import StorageError, UsageError, reading
from asyncdcp.extensions import Chain, ExtensionRegistry, Seals
from asyncdcp.format.blocks import SLAB_BYTES
from asyncdcp.metadata import Metadata, Record, StorageMeta
from asyncdcp.names import record_name
from asyncdcp.pipeline.descriptions import Description, Viewer, read_description, with_commit
from asyncdcp.pipeline.union import FileMap, check_sizes, damaged, unite
from asyncdcp.pipeline.windows import (
    ALIGNMENT_LIMIT,
    ReadRange,
    Window,
    WindowCheck,
    cut_windows,
    decoded_blocks,
    layout_of,
    place_block,
    place_window,
    span_of,
    straight_parts,
)
from asyncdcp.storage.files import io_buffer
from asyncdcp.storage.port import Fetch, ObjectReader, Storage
from asyncdcp.trace import Trace
from asyncdcp.unwinding import all_of

READS_IN_FLIGHT = 6
WINDOWS_A_TRIP = 4
"""So many windows are read in one trip to a thread: a trip costs a fifth of what a window in the page cache does."""


async def _fetch(file: FileMap, source: ObjectReader, reads: Iterable[Fetch]) -> None:
    """As ``ObjectReader.fetch``, with the errors of a file that is not as long as it should be."""
    if source.size != file.stored_size:
        raise damaged(file, f"has {source.size} bytes")
    try:
        await source.fetch(*reads)
    except EOFError as error:
        raise damaged(file, "has become shorter") from error


class RangeReader:
    """Reads ranges of the files of a storage, several at once; an async context manager that closes what it opened.

    ``files`` are by the names that ranges call them by.
    """

    def __init__(self, storage: Storage, files: Mapping[str, FileMap]) -> None:
        self._storage = storage
        self._files = files
        self._objects: dict[str, ObjectReader] = {}
        self._chains: dict[tuple[str, ...], Chain] = {}
        self._save_id = ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the data files; safe to call twice."""
        with anyio.CancelScope(shield=True):
            for name in list(self._objects):
                await self._close(name)

    async def _close(self, name: str) -> None:
        with suppress(StorageError):  # of a file that was only read nothing can be lost
            await self._objects.pop(name).aclose()

    async def read(self, ranges: Sequence[ReadRange], trace: Trace) -> None:
        """Reads all ranges. Every byte of a file with checksums is verified before a range's ``deliver`` sees it.

        Ranges may overlap. Spans "read" count what is read, spans "verify" the bytes of the ranges. ``into`` buffers
        may hold unverified bytes when this raises ``ChecksumMismatch``. On return and on raise no buffer is in use any
        more. Files are open only while they are read.
        """
        info = self._storage.info
        windows = cut_windows(ranges, self._files, info.read_gap)
        left = Counter(window.file.name for window in windows)
        tasks = min(max(READS_IN_FLIGHT, info.transfers), len(windows))
        waiting, opening = deque(windows), anyio.Lock()
        room = max([SLAB_BYTES, *(_room(window) for window in windows if window.file.transforms)])

        async def work() -> None:
            bounce = io_buffer(room)
            while waiting:
                batch = _next(waiting, tasks)
                file = batch[0].file
                async with opening:
                    source = await self._source(file)
                with trace.span("read", sum(window.end - window.begin for window in batch)):
                    await _fetch(file, source, [self._reading(window, source, bounce, trace) for window in batch])
                left[file.name] -= len(batch)
                if not left[file.name]:
                    await self._close(file.name)

        try:
            with reading(info.location):
                await all_of(work, tasks)
        finally:
            await self.aclose()

    def _chain(self, file: FileMap) -> Chain:
        if file.transforms not in self._chains:
            missing = ", ".join(file.transforms)
            raise UsageError(f"{file.name} was transformed by {missing}, and was opened without its extensions")
        return self._chains[file.transforms]

    async def _source(self, file: FileMap) -> ObjectReader:
        if file.name not in self._objects:
            try:
                self._objects[file.name] = await self._storage.open(file.name)
            except FileNotFoundError as error:
                raise damaged(file, "is missing") from error
        return self._objects[file.name]

    def _reading(self, window: Window, source: ObjectReader, bounce: memoryview, trace: Trace) -> Fetch:
        """What is to be read of a window, and how it then comes to its targets."""
        if window.file.transforms:
            return self._reading_transformed(window, source, bounce, trace)
        straight, length = straight_parts(window), window.end - window.begin
        layout = layout_of(window, straight, bounce)
        whole = [bounce[: -(-length // source.alignment) * source.alignment]]
        check = WindowCheck(window, layout)

        def place(cached: bool) -> None:  # noqa: FBT001  # what the port says
            with trace.span("verify", window.wanted):
                (check if cached else WindowCheck(window, whole)).finish()
                place_window(window, straight if cached else [], bounce)

        return Fetch(window.begin, layout, whole, place, check.advance)

    def _reading_transformed(self, window: Window, source: ObjectReader, bounce: memoryview, trace: Trace) -> Fetch:
        file = window.file
        chain = self._chain(file)
        span = span_of(file, window.begin, window.end, source.alignment)
        whole = [bounce[: span.length]]

        def place(cached: bool) -> None:  # noqa: FBT001  # what the port says
            with trace.span("verify", window.wanted):
                for begin, block in decoded_blocks(file, chain, self._save_id, span, bounce):
                    place_block(window.parts, begin, block)

        return Fetch(span.start, whole, whole, place)


class CheckpointReader(RangeReader):
    """An open checkpoint of asyncdcp's own format. Made by ``open``."""

    def __init__(self, storage: Storage, record: Record, metadata: Metadata, files: Mapping[str, FileMap]) -> None:
        super().__init__(storage, files)
        self._save_id = record.save_id
        self.record = record
        self.metadata = metadata
        self.files = files.values()

    @classmethod
    async def open(
        cls,
        storage: Storage,
        viewer: Viewer | None = None,
        registry: ExtensionRegistry | None = None,
        *,
        data: bool = True,
    ) -> CheckpointReader:
        """Finds the checkpoint at ``storage`` and checks its Record, its indexes and the sizes of its files.

        ``CheckpointNotFound``, ``AmbiguousCheckpoint``, ``UnsupportedFormat`` or ``CorruptCheckpoint`` otherwise,
        naming file and tensor; ``KeyUnavailable`` where it is encrypted. No data file is read yet. Of what ranks have
        for themselves, the reader has what ``viewer`` says, by default rank 0's.

        ``registry`` finds the extensions and their keys. With ``data=False`` only what describes the data is opened:
        its files may be gone, extensions are not needed, nor keys unless that is encrypted too, and ``read`` raises for
        transformed data.
        """
        known = registry or ExtensionRegistry()
        seals = Seals(known)

        async def opened(record: Record) -> CheckpointReader:
            found = await read_description(storage, record, seals)
            reader = await cls.of(storage, found, viewer or Viewer(), known, data=data)
            if data:
                check_sizes(reader.files, await storage.list())
            return reader

        return await with_commit(storage, opened, seals)

    @classmethod
    async def of(
        cls,
        storage: Storage,
        found: Description,
        viewer: Viewer,
        registry: ExtensionRegistry | None = None,
        *,
        data: bool = True,
    ) -> CheckpointReader:
        """A reader of a checkpoint that is described already, as by ``describe``; its data files are not looked for."""
        known = registry or ExtensionRegistry()
        seals, location = Seals(known), storage.info.location
        with reading(location):
            record, indexes = await to_thread.run_sync(found.decoded, seals)
            union = await to_thread.run_sync(unite, indexes, viewer.looks_as(record.world_size, indexes, location))
            meta = StorageMeta(location, record.save_id, record.world_size, record.time, record.metadata)
            metadata = Metadata(union.tensors, union.storage, meta, union.aliases, union.tree, union.values, union.own)
            reader = cls(storage, record, metadata, union.files)
            if data:
                await to_thread.run_sync(reader._find_extensions, known, seals)
        return reader

    def _find_extensions(self, registry: ExtensionRegistry, seals: Seals) -> None:
        """What an encrypting extension has written is only taken with a Record and indexes that it vouches for."""
        record = self.record
        for transforms in {file.transforms for file in self._files.values() if file.transforms}:
            chain = self._chains[transforms] = Chain(registry.from_descriptor_list(transforms))
            if chain.seals:
                seals.require([record_name(record.save_id), *(ref.name for ref in record.indexes)])


def _next(waiting: deque[Window], tasks: int) -> list[Window]:
    """The next window, and some behind it of the same file, so that no task is left without."""
    batch = [waiting.popleft()]
    most = min(WINDOWS_A_TRIP, len(waiting) // tasks)
    while len(batch) < most and waiting[0].file is batch[0].file:
        batch.append(waiting.popleft())
    return batch


def _room(window: Window) -> int:
    return span_of(window.file, window.begin, window.end, 1).length + 2 * ALIGNMENT_LIMIT
