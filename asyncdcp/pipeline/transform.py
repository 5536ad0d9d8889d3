"""The stage between the arena and the storage: from staged slabs to pieces of files, with the table of their blocks.

Without extensions a slab is a piece: it is checksummed and written from the arena as it lies there. With them its
blocks are encoded on threads, several slabs at once, and packed in order, back to back, into buffers aligned for direct
I/O. The memory of that is bounded: the encoded blocks of ``slabs_at_once()`` slabs, and ``BUFFERS`` buffers.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import anyio

from asyncdcp.errors import AsyncDCPError
from asyncdcp.extensions.base import BlockContext
from asyncdcp.extensions.chain import Chain
from asyncdcp.format.blocks import block_count, checksum, element_size, slice_blocks, stored_limit
from asyncdcp.pipeline.channel import Channel
from asyncdcp.pipeline.messages import FileJob, SaveJob, SlabReady
from asyncdcp.storage.files import address, io_buffer
from asyncdcp.threads import on_thread
from asyncdcp.trace import Trace
from asyncdcp.unwinding import frameless

CHECKSUMS_IN_FLIGHT = 2
BUFFERS = 6
"""Those being written, and one or two that are being filled."""
_SLABS_LIMIT = 8


class SlabSource(Protocol):
    """Where the writer gets its slabs. Its methods run on the writer's loop."""

    async def receive(self) -> SlabReady:
        """The next slab, in any order; ``anyio.EndOfStream`` after the last."""
        ...

    def view(self, slot: int) -> memoryview:
        """The whole arena slot."""
        ...

    def done(self, slot: int) -> None:
        """The slot is not used any more, and may be filled again."""
        ...


class Piece(NamedTuple):
    """Bytes for ``offset`` of data file number ``file``: the first ``length`` of ``buffer``, whose rest is for padding.

    ``free`` is called once they are written. ``covers`` is how many bytes of the file's image end in this piece.
    """

    file: int
    offset: int
    length: int
    buffer: memoryview
    free: Callable[[], None]
    covers: int


@dataclass
class StoredFile:
    """A data file as it comes to be: the table of its blocks, and how many pieces it has.

    ``awaited`` are the slabs that have not come; ``pieces`` is None as long as it is not known.
    """

    job: FileJob
    awaited: set[int]
    checksums: list[int]
    lengths: list[int] | None
    size: int
    pieces: int | None
    written: int = 0

    @classmethod
    def of(cls, file: FileJob, job: SaveJob) -> StoredFile:
        """Nothing of it has come yet."""
        slabs = -(-file.size // job.slab_bytes)
        blocks = block_count(file.size, job.block_bytes)
        awaited, checksums = set(range(slabs)), [0] * blocks
        if job.transforms:
            return cls(file, awaited, checksums, [0] * blocks, 0, None)
        return cls(file, awaited, checksums, None, file.size, slabs)


class Turn(NamedTuple):
    """A slab, what to wait for before it goes on, and what to set after that."""

    slab: SlabReady
    before: anyio.Event
    after: anyio.Event


class Intake:
    """Takes slabs from the source. Every slab must come once, and whole; anything else would make a checkpoint that
    cannot be loaded.
    """

    def __init__(self, job: SaveJob, files: Sequence[StoredFile], slabs: SlabSource) -> None:
        self._job = job
        self._files = files
        self._slabs = slabs
        counts = [len(file.awaited) for file in files]
        self._order = ((file, number) for file, count in enumerate(counts) for number in range(count))
        self._early: dict[tuple[int, int], SlabReady] = {}
        self._taking = anyio.Lock()
        self._last = anyio.Event()
        self._last.set()

    async def next(self, *, in_order: bool) -> Turn:
        """Some slab, which may go on at once; or ``in_order`` the one that follows the last in its file, or the first
        of the next file, and goes on after that. ``anyio.EndOfStream`` after the last.
        """
        if not in_order:
            return Turn(await self._any(), self._last, self._last)
        async with self._taking:
            slab, before = await self._following(), self._last
            self._last = anyio.Event()
            return Turn(slab, before, self._last)

    async def _any(self) -> SlabReady:
        slab = await self._slabs.receive()
        size = self._job.slab_bytes
        if 0 <= slab.file < len(self._files):
            file = self._files[slab.file]
            whole = min(size, file.job.size - slab.number * size)
            if slab.number in file.awaited and slab.length == whole:
                file.awaited.remove(slab.number)
                return slab
        raise AsyncDCPError(f"{slab} is not a slab of this save, or came before")

    async def _following(self) -> SlabReady:
        """Those that come early wait in their slots. They are few: slots are filled in order, several at once."""
        wanted = next(self._order, None)
        if wanted is None:
            raise anyio.EndOfStream
        while wanted not in self._early:
            slab = await self._any()
            self._early[slab.file, slab.number] = slab
        return self._early.pop(wanted)


@dataclass
class Stage:
    """What the stages of one save share. ``out`` is closed by whichever of the two runs."""

    job: SaveJob
    files: Sequence[StoredFile]
    slabs: SlabSource
    trace: Trace
    out: Channel[Piece]
    intake: Intake = field(init=False)

    def __post_init__(self) -> None:
        self.intake = Intake(self.job, self.files, self.slabs)


async def checksum_slabs(stage: Stage, *, in_order: bool = False) -> None:
    """Without extensions: slabs go on as they lie in the arena, in whatever order they come.

    With ``in_order`` they go on in the order of the image. Those that come early wait in their slots, which delays
    nobody for long: slots are filled in order, so the one that is waited for has its own already.
    """
    job, limiter = stage.job, anyio.CapacityLimiter(CHECKSUMS_IN_FLIGHT)

    async def work() -> None:
        while True:
            try:
                slab, before, sent = await stage.intake.next(in_order=in_order)
            except anyio.EndOfStream:
                return
            view = stage.slabs.view(slab.slot)
            with stage.trace.span("transform", slab.length):
                sums = await on_thread(limiter, checksum_blocks, view[: slab.length], job.block_bytes)
            first = slab.number * (job.slab_bytes // job.block_bytes)
            stage.files[slab.file].checksums[first : first + len(sums)] = sums
            free = partial(stage.slabs.done, slab.slot)
            offset = slab.number * job.slab_bytes
            await before.wait()
            await stage.out.send(Piece(slab.file, offset, slab.length, view, free, slab.length), slab.length)
            sent.set()

    with stage.out:
        async with anyio.create_task_group() as workers:
            for _ in range(CHECKSUMS_IN_FLIGHT):
                workers.start_soon(frameless, work)


async def encode_slabs(stage: Stage, chain: Chain) -> None:
    """With extensions: slabs are taken in order, encoded several at once, and packed in order again."""
    limiter = anyio.CapacityLimiter(slabs_at_once())
    packer = _Packer(stage, limiter)

    async def work() -> None:
        while True:
            try:
                slab, before, packed = await stage.intake.next(in_order=True)
            except anyio.EndOfStream:
                return
            data = stage.slabs.view(slab.slot)[: slab.length]
            with stage.trace.span("transform", slab.length):
                blocks = await on_thread(limiter, _encode_blocks, stage, chain, slab, data)
            await before.wait()
            await packer.add(slab, blocks)
            stage.slabs.done(slab.slot)  # not before: an extension may have returned a view of it
            packed.set()

    with stage.out:
        async with anyio.create_task_group() as workers:
            for _ in range(slabs_at_once()):
                workers.start_soon(frameless, work)


def slabs_at_once() -> int:
    """How many slabs are encoded at the same time: as many as this process has CPUs, up to a limit."""
    return max(1, min(len(os.sched_getaffinity(0)), _SLABS_LIMIT))


def checksum_blocks(data: memoryview, block_bytes: int) -> list[int]:
    """The checksums of a slab's blocks."""
    return [checksum(block) for block in slice_blocks(data, block_bytes)]


class _Encoded(NamedTuple):
    data: memoryview
    checksum: int


def _encode_blocks(stage: Stage, chain: Chain, slab: SlabReady, data: memoryview) -> list[_Encoded]:
    job, file = stage.job, stage.files[slab.file]
    first = slab.number * (job.slab_bytes // job.block_bytes)
    encoded = []
    writable: set[int] = set()
    for number, block in enumerate(slice_blocks(data, job.block_bytes), first):
        begin = number * job.block_bytes
        size = element_size(file.job.elements, begin, begin + len(block))
        limit = stored_limit(job.block_bytes)
        context = BlockContext(job.save_id, file.job.name, number, len(file.checksums), size, limit)
        stored = chain.encode(block, context)
        if not stored.readonly:  # a buffer that is used again: the blocks are only packed once all are encoded
            if address(stored) in writable:
                what = f"{chain.descriptors[-1]} returned the same memory for two blocks: it must be new for each"
                raise AsyncDCPError(what, path=file.job.name)
            writable.add(address(stored))
        encoded.append(_Encoded(stored, checksum(stored)))
    return encoded


class _Packer:
    """Packs encoded blocks into aligned buffers of a slab's length, and sends the full ones, and each file's last."""

    def __init__(self, stage: Stage, limiter: anyio.CapacityLimiter) -> None:
        self._stage = stage
        self._limiter = limiter
        self._room = anyio.Semaphore(BUFFERS)
        self._idle: list[memoryview] = []
        self._buffer: memoryview | None = None
        self._filled = self._covers = self._sent = 0

    async def add(self, slab: SlabReady, blocks: list[_Encoded]) -> None:
        """Takes the next slab; on return nothing of it is needed any more."""
        file, job = self._stage.files[slab.file], self._stage.job
        first = slab.number * (job.slab_bytes // job.block_bytes)
        assert file.lengths is not None
        for number, block in enumerate(blocks, first):
            file.checksums[number], file.lengths[number] = block.checksum, len(block.data)
        left = [block.data for block in blocks]
        while left:
            if self._buffer is not None and self._filled == len(self._buffer):
                await self._send(slab.file)
            if self._buffer is None:
                await self._room.acquire()
                self._buffer = self._idle.pop() if self._idle else io_buffer(job.slab_bytes)
            left = await on_thread(self._limiter, self._fill, left)
        self._covers += slab.length
        if first + len(blocks) == len(file.lengths):
            file.size = sum(file.lengths)
            file.pieces = self._sent + 1
            await self._send(slab.file)
            self._sent = 0

    def _fill(self, blocks: list[memoryview]) -> list[memoryview]:
        """Copies to the buffer what fits, and returns the rest."""
        assert self._buffer is not None
        target = address(self._buffer)
        for number, block in enumerate(blocks):
            taken = min(len(block), len(self._buffer) - self._filled)
            ctypes.memmove(target + self._filled, address(block), taken)  # releases the GIL
            self._filled += taken
            if taken < len(block):
                return [block[taken:], *blocks[number + 1 :]]
        return []

    async def _send(self, file: int) -> None:
        buffer, length, covers = self._buffer, self._filled, self._covers
        assert buffer is not None
        self._buffer, self._filled, self._covers = None, 0, 0
        offset = self._sent * self._stage.job.slab_bytes
        self._sent += 1
        free = partial(self._free, buffer)
        await self._stage.out.send(Piece(file, offset, length, buffer, free, covers), length)

    def _free(self, buffer: memoryview) -> None:
        self._idle.append(buffer)
        self._room.release()
