"""CheckpointWriter: one rank's part of one save, from the slabs in the arena to the settled Record.

    slabs ─▶ transform ─▶ [channel] ─▶ store ─▶ finish ─▶ index ─▶ settle

It runs on the engine's thread or in the background process, unchanged; what it needs from either is a ``SlabSource``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from asyncdcp.errors import AsyncDCPError, CommitUnknown, DeadlineExceeded, PeerFailed, SaveAborted, ungrouped
from asyncdcp.format.blocks import block_count, checksum, pack_checksums, slice_blocks
from asyncdcp.metadata import FileTable, IndexHead, IndexRef, digest, encode_index
from asyncdcp.names import belongs_to, index_name, record_name
from asyncdcp.pipeline.channel import Channel
from asyncdcp.pipeline.commit import State
from asyncdcp.pipeline.messages import FileJob, Saved, SaveJob, SlabReady
from asyncdcp.pipeline.settle import GiveUpSignal, Reason, Settlement, existing_commits, known_error
from asyncdcp.storage.port import ObjectWriter, Storage
from asyncdcp.threads import on_thread
from asyncdcp.trace import Trace

_logger = logging.getLogger("asyncdcp")

TRANSFORMS_IN_FLIGHT = 2
WRITES_IN_FLIGHT = 4


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


class EncodedSlab(NamedTuple):
    """A slab as it is to be stored, and the checksums of its blocks."""

    slab: SlabReady
    checksums: list[int]


@dataclass
class _DataFile:
    """``awaited`` are the slabs that have not come, ``missing`` counts those that are not written."""

    job: FileJob
    writer: ObjectWriter
    awaited: set[int]
    missing: int
    checksums: list[int]
    finished: bool = False


class CheckpointWriter:
    """Writes and settles one save. ``give_up`` may be set at any time; ``run`` is called once and is not cancelled."""

    def __init__(self, job: SaveJob, storage: Storage, slabs: SlabSource, trace: Trace) -> None:
        self._job = job
        self._storage = storage
        self._slabs = slabs
        self._trace = trace
        self._files: list[_DataFile] = []
        self._own: IndexRef | None = None
        self._limiter = anyio.CapacityLimiter(TRANSFORMS_IN_FLIGHT)
        self.give_up = GiveUpSignal()

    async def run(self) -> Saved:
        """Returns when the save is committed and durable; raises what went wrong once it is sure not to be.

        ``CommitUnknown`` if neither can be told. On return and on raise no slot is in use, and nothing is open.
        """
        try:
            with ungrouped():
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._watch_deadline)
                    await self._prepare()
                    settlement = Settlement(self._job, self._storage, self.give_up, self._own)
                    state = await self._settle(settlement)
                    tasks.cancel_scope.cancel()
        except BaseException:
            await self._discard(keep_finished=True)
            raise
        if state is State.COMMITTED:
            return await self._saved(settlement)
        await self._discard(keep_finished=state is State.UNKNOWN)
        raise self._failure(state, settlement)

    async def _settle(self, settlement: Settlement) -> State:
        if not self._files and self._own is None and self._job.world_size == 1:
            return State.FAILED  # nothing was written and nobody else waits for word: no trace is left
        with self._trace.span("commit"):
            return await settlement.run()

    async def _watch_deadline(self) -> None:
        seconds = self._job.deadline
        await anyio.sleep(seconds)
        error = DeadlineExceeded(
            f"the save to {self._storage.info.location} was not durable within {seconds:g} s (option save_deadline)"
        )
        self.give_up.set(Reason("deadline", error))

    async def _prepare(self) -> None:
        """Writes data and Index, durably. Where that fails or is given up, the signal is set and knows why."""
        with anyio.CancelScope() as scope:
            self.give_up.attach(scope.cancel)
            try:
                with ungrouped():
                    await self._write()
            except Exception as error:  # noqa: BLE001  # whatever failed, the save is settled and its files are closed
                self.give_up.set(Reason("failed", known_error(error, self._storage.info.location)))

    async def _write(self) -> None:
        await checkpoint_if_cancelled()
        await existing_commits(self._storage, self._job)
        await self._create_files()
        with self._trace.span("pipeline"):
            encoded: Channel[EncodedSlab] = Channel(WRITES_IN_FLIGHT * self._job.slab_bytes)
            async with anyio.create_task_group() as stages:
                stages.start_soon(self._transform, encoded)
                stages.start_soon(self._store, encoded)
        with self._trace.span("sync"):
            await self._put_index()
            await self._storage.barrier()  # of the data's names, too: nobody looks at data whose index is not there

    async def _create_files(self) -> None:
        job = self._job
        for file in job.files:
            await checkpoint_if_cancelled()  # a storage that shields its work may pass over a cancellation
            writer = await self._storage.create(file.name, file.size)
            slabs = -(-file.size // job.slab_bytes)
            checksums = [0] * block_count(file.size, job.block_bytes)
            self._files.append(_DataFile(file, writer, set(range(slabs)), slabs, checksums))

    def _accept(self, slab: SlabReady) -> None:
        """Every slab must come once, and whole; anything else would make a checkpoint that cannot be loaded."""
        size = self._job.slab_bytes
        if 0 <= slab.file < len(self._files):
            file = self._files[slab.file]
            whole = min(size, file.job.size - slab.number * size)
            if slab.number in file.awaited and slab.length == whole:
                file.awaited.remove(slab.number)
                return
        raise AsyncDCPError(f"{slab} is not a slab of this save, or came before")

    async def _transform(self, out: Channel[EncodedSlab]) -> None:
        """Encodes and checksums slabs, several at once."""

        async def work() -> None:
            while True:
                try:
                    slab = await self._slabs.receive()
                except anyio.EndOfStream:
                    return
                self._accept(slab)
                with self._trace.span("transform", slab.length):
                    data = self._slabs.view(slab.slot)[: slab.length]
                    checksums = await on_thread(self._limiter, checksum_blocks, data, self._job.block_bytes)
                await out.send(EncodedSlab(slab, checksums), slab.length)

        with out:
            async with anyio.create_task_group() as workers:
                for _ in range(TRANSFORMS_IN_FLIGHT):
                    workers.start_soon(work)

    async def _store(self, encoded: Channel[EncodedSlab]) -> None:
        """Writes slabs, several at once, and finishes each file with its last one."""

        async def work() -> None:
            async for slab, checksums in encoded:
                file = self._files[slab.file]
                with self._trace.span("write", slab.length):
                    await self._store_slab(file, slab)
                first = slab.number * (self._job.slab_bytes // self._job.block_bytes)
                file.checksums[first : first + len(checksums)] = checksums
                file.missing -= 1
                if not file.missing:
                    with self._trace.span("sync"):
                        await file.writer.finish(file.job.size)
                    file.finished = True

        async with anyio.create_task_group() as workers:
            for _ in range(max(WRITES_IN_FLIGHT, self._storage.info.transfers)):
                workers.start_soon(work)
        unfinished = [file.job.name for file in self._files if not file.finished]
        if unfinished:
            raise AsyncDCPError(f"staging ended before all slabs of {', '.join(unfinished)} had come")

    async def _store_slab(self, file: _DataFile, slab: SlabReady) -> None:
        """Writes one slab and gives its slot back. The file's last one is padded up to the alignment; ``finish`` cuts
        that off.
        """
        view = self._slabs.view(slab.slot)
        padded = min(-(-slab.length // file.writer.alignment) * file.writer.alignment, len(view))
        if padded > slab.length:
            view[slab.length : padded] = bytes(padded - slab.length)
        await file.writer.write(slab.number * self._job.slab_bytes, view[:padded])
        self._slabs.done(slab.slot)

    async def _put_index(self) -> None:
        job = self._job
        tables = [FileTable(file.job.name, file.job.size, pack_checksums(file.checksums)) for file in self._files]
        head = IndexHead(job.save_id, job.rank, job.block_bytes, [])
        data = encode_index(head, bytes(job.plan), bytes(job.values), tables)
        own = IndexRef(index_name(job.save_id, job.rank), len(data), digest(data))
        try:
            self._own = own  # before it is there: a put that fails may have been carried out
            await self._storage.put(own.name, data)
        except FileExistsError:
            self._own = None
            raise

    async def _saved(self, settlement: Settlement) -> Saved:
        record = settlement.record
        replaced = record.replaces if record else []
        if replaced and self._job.rank == 0:
            await self._delete_replaced(replaced)
        info = self._storage.info
        return Saved(
            save_id=self._job.save_id,
            stored_bytes=sum(file.job.size for file in self._files),
            replaced=replaced,
            filesystem=info.filesystem,
            volatile=info.volatile,
            seconds=self._trace.seconds(),
            bytes=self._trace.bytes(),
        )

    async def _delete_replaced(self, replaced: list[str]) -> None:
        """Removes what the commit took the place of: data first, Records last, so that what remains is always
        explained.
        """
        with _logged("replaced checkpoints could not be deleted"):
            names = await self._storage.list()
            files = [name for name in names for save_id in replaced if belongs_to(name, save_id)]
            records = {record_name(save_id) for save_id in replaced}
            await self._storage.delete([name for name in files if name not in records])
            await self._storage.delete([name for name in files if name in records])

    async def _discard(self, *, keep_finished: bool) -> None:
        """Closes what is open, and removes what this rank wrote, of a save that is settled as not committed; what is
        finished is kept if that is not sure.
        """
        with anyio.CancelScope(shield=True):
            for file in self._files:
                if not file.finished:
                    with _logged("an unfinished file could not be removed"):
                        await file.writer.abort()
            names = [file.job.name for file in self._files if file.finished]
            names += [self._own.name] if self._own else []
            if names and not keep_finished:
                with _logged("the rest of a given-up save could not be deleted"):
                    await self._storage.delete(names)

    def _failure(self, state: State, settlement: Settlement) -> AsyncDCPError:
        location, reason, record = self._storage.info.location, self.give_up.reason, settlement.record
        if state is State.UNKNOWN:
            error: AsyncDCPError = CommitUnknown(
                f"whether the save to {location} was committed cannot be told", path=location
            )
        elif reason is not None and not isinstance(reason.error, CommitUnknown):
            return reason.error
        elif reason is None and record is not None and record.rank not in (None, self._job.rank):
            error = PeerFailed(f"rank {record.rank} gave the save up: {record.cause}", path=location, rank=record.rank)
        else:  # the claim of the commit was not heard of, and then an abort won
            cause = record.cause if record else "unknown"
            error = SaveAborted(f"the save to {location} was given up: {cause}", path=location)
        error.__cause__ = reason.error if reason else None
        return error


@contextmanager
def _logged(what: str) -> Iterator[None]:
    """Cleaning up goes on, whatever fails."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  # what the save came to is what the caller is told
        _logger.warning("%s: %r", what, error)


def checksum_blocks(data: memoryview, block_bytes: int) -> list[int]:
    """The checksums of a slab's blocks."""
    return [checksum(block) for block in slice_blocks(data, block_bytes)]
