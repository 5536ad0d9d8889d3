"""CheckpointWriter: one rank's part of one save, from the slabs in the arena to the settled Record.

    slabs ─▶ transform ─▶ [channel] ─▶ store ─▶ finish ─▶ index ─▶ settle

It runs on the engine's thread or in the background process, unchanged; what it needs from either is a ``SlabSource``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import anyio
from anyio import to_thread
from anyio.lowlevel import checkpoint_if_cancelled

from asyncdcp.envelope import IndexHead, digest, encode_index
from asyncdcp.errors import AsyncDCPError, CommitUnknown, DeadlineExceeded, SaveAborted, StorageError, UnsupportedValue
from asyncdcp.extensions import PLAIN, Chain, Seals
from asyncdcp.format.blocks import pack_checksums
from asyncdcp.metadata import INDEX_LIMIT, FileTable, IndexRef
from asyncdcp.names import belongs_to, index_name, record_name
from asyncdcp.pipeline.channel import Channel
from asyncdcp.pipeline.commit import State
from asyncdcp.pipeline.messages import Saved, SaveJob
from asyncdcp.pipeline.records import commit_unknown, known_error, peer_error
from asyncdcp.pipeline.settle import GiveUpSignal, Reason, Settlement, existing_commits
from asyncdcp.pipeline.transform import Piece, SlabSource, Stage, StoredFile, checksum_slabs, encode_slabs
from asyncdcp.storage.port import ObjectWriter, Storage
from asyncdcp.trace import Trace
from asyncdcp.unwinding import cancelled_by_others, frameless, ungrouped

_logger = logging.getLogger("asyncdcp")

WRITES_IN_FLIGHT = 4


@dataclass
class _DataFile:
    """A data file, and what it is written with."""

    stored: StoredFile
    writer: ObjectWriter
    finished: bool = False


class CheckpointWriter:
    """Writes and settles one save. ``give_up`` may be set at any time; ``run`` is called once and is not cancelled.

    ``chain`` are the extensions that ``job.transforms`` names.
    """

    def __init__(self, job: SaveJob, storage: Storage, slabs: SlabSource, trace: Trace, chain: Chain = PLAIN) -> None:
        if chain.descriptors != job.transforms:
            raise AsyncDCPError(f"the save is to be transformed by {job.transforms}, and not by {chain.descriptors}")
        self._job = job
        self._chain = chain
        self._unseal = Seals.of(chain)
        self._storage = storage
        self._slabs = slabs
        self._trace = trace
        self._files: list[_DataFile] = []
        self._own: IndexRef | None = None
        self._until = float("inf")
        self.give_up = GiveUpSignal()

    async def run(self) -> Saved:
        """Returns when the save is committed and durable; raises what went wrong once it is sure not to be.

        ``CommitUnknown`` if neither can be told. On return and on raise no slot is in use, and nothing is open.
        """
        self._until = anyio.current_time() + self._job.deadline
        try:
            with ungrouped():
                async with anyio.create_task_group() as tasks:
                    watching = anyio.CancelScope()  # of its own: a group's cancelled task holds itself, and this
                    tasks.start_soon(self._watch_deadline, watching)
                    await self._prepare()
                    settlement = Settlement(self._job, self._storage, self.give_up, self._own, self._chain)
                    settlement.stored_bytes = self._stored_bytes()
                    state = await self._settle(settlement)
                    watching.cancel()
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

    async def _watch_deadline(self, watching: anyio.CancelScope) -> None:
        seconds = self._job.deadline
        with watching:
            await anyio.sleep(seconds)
            location = self._storage.info.location
            message = f"the save to {location} was not durable within {seconds:g} s (option save_deadline)"
            error = DeadlineExceeded(message, path=location)
            self.give_up.set(Reason("deadline", error))

    async def _prepare(self) -> None:
        """Writes data and Index, durably. Where that fails or is given up, the signal is set and knows why."""
        with anyio.CancelScope() as scope:
            self.give_up.attach(scope.cancel)
            try:
                with ungrouped(), cancelled_by_others():
                    await self._write()
            except Exception as error:  # noqa: BLE001  # whatever failed, the save is settled and its files are closed
                self.give_up.set(Reason("failed", known_error(error, self._storage.info.location)))

    async def _write(self) -> None:
        await checkpoint_if_cancelled()
        await existing_commits(self._storage, self._job, self._unseal)
        await self._create_files()
        pieces: Channel[Piece] = Channel(WRITES_IN_FLIGHT * self._job.slab_bytes)
        try:
            async with anyio.create_task_group() as stages:
                stages.start_soon(frameless, partial(self._transform, pieces))
                stages.start_soon(frameless, partial(self._store, pieces))
        finally:
            pieces.drop()  # the frames of what failed keep the channel
        with self._trace.span("sync"):
            await self._put_index()
            await self._storage.barrier()  # of the data's names, too: nobody looks at data whose index is not there

    async def _create_files(self) -> None:
        job = self._job
        for file in job.files:
            await checkpoint_if_cancelled()  # a storage that shields its work may pass over a cancellation
            hint = 0 if self._chain else file.size
            writer = await self._storage.create(file.name, hint)
            self._files.append(_DataFile(StoredFile.of(file, job), writer))

    async def _transform(self, out: Channel[Piece]) -> None:
        stage = Stage(self._job, [file.stored for file in self._files], self._slabs, self._trace, out)
        if self._chain:
            await encode_slabs(stage, self._chain)
        else:
            await checksum_slabs(stage, in_order=self._storage.info.in_order)

    async def _store(self, pieces: Channel[Piece]) -> None:
        """Writes pieces, several at once, and finishes each file with its last one."""
        async with anyio.create_task_group() as workers:
            for _ in range(max(WRITES_IN_FLIGHT, self._storage.info.transfers)):
                workers.start_soon(frameless, partial(self._store_some, pieces))
        unfinished = [file.stored.job.name for file in self._files if not file.finished]
        if unfinished:
            raise AsyncDCPError(f"staging ended before all slabs of {', '.join(unfinished)} had come")

    async def _store_some(self, pieces: Channel[Piece]) -> None:
        async for piece in pieces:
            file = self._files[piece.file]
            with self._trace.span("write", piece.covers):
                await self._store_piece(file, piece)
            file.stored.written += 1
            if file.stored.written == file.stored.pieces:
                with self._trace.span("sync"):
                    await file.writer.finish(file.stored.size)
                file.finished = True

    async def _store_piece(self, file: _DataFile, piece: Piece) -> None:
        """Writes one piece and gives its memory back. The file's last one is padded up to the alignment; ``finish``
        cuts that off.
        """
        alignment, view = file.writer.alignment, piece.buffer
        padded = min(-(-piece.length // alignment) * alignment, len(view))
        if padded > piece.length:
            view[piece.length : padded] = bytes(padded - piece.length)
        await file.writer.write(piece.offset, view[:padded])
        piece.free()

    async def _put_index(self) -> None:
        job = self._job
        tables = [
            FileTable(file.job.name, file.size, pack_checksums(file.checksums), file.lengths)
            for file in (file.stored for file in self._files)
        ]
        head = IndexHead(job.save_id, job.rank, job.block_bytes, job.transforms)
        sealer = self._chain.sealer(job.save_id)
        data = await to_thread.run_sync(encode_index, head, bytes(job.plan), bytes(job.values), tables, sealer)
        if len(data) > INDEX_LIMIT:  # nobody could read it again
            raise UnsupportedValue(
                f"the index of the save to {self._storage.info.location} has {len(data):,} bytes, and may have "
                f"{INDEX_LIMIT:,}; {len(job.values):,} of them are plain values: hold large arrays as tensors",
                path=self._storage.info.location,
            )
        own = IndexRef(index_name(job.save_id, job.rank), len(data), digest(data))
        try:
            self._own = own  # before it is there: a put that fails may have been carried out
            await self._storage.put(own.name, data)
        except FileExistsError:
            self._own = None
            raise
        except CommitUnknown as error:  # whether the Index is there; nothing was committed yet
            message = f"the index of the save to {self._storage.info.location} could not be stored: {error}"
            raise StorageError(message, path=error.path, errno=error.errno) from error

    async def _saved(self, settlement: Settlement) -> Saved:
        record = settlement.record
        replaced = record.replaces if record else []
        if replaced and self._job.rank == 0:
            left = self._until - anyio.current_time()  # the save is durable: it must not come to be late by this
            with _logged("replaced checkpoints could not be deleted"), anyio.fail_after(left):
                await delete_saves(self._storage, replaced)
        return Saved(
            save_id=self._job.save_id,
            stored_bytes=self._stored_bytes(),
            replaced=replaced,
            filesystem=self._storage.info.filesystem,
            seconds=self._trace.seconds(),
        )

    def _stored_bytes(self) -> int:
        return sum(file.stored.size for file in self._files)

    async def _discard(self, *, keep_finished: bool) -> None:
        """Closes what is open, and removes what this rank wrote, of a save that is settled as not committed; what is
        finished is kept if that is not sure.
        """
        with anyio.CancelScope(shield=True):
            for file in self._files:
                if not file.finished:
                    with _logged("an unfinished file could not be removed"):
                        await file.writer.abort()
            names = [file.stored.job.name for file in self._files if file.finished]
            names += [self._own.name] if self._own else []
            if names and not keep_finished:
                with _logged("the rest of a given-up save could not be deleted"):
                    await self._storage.delete(names)

    def _failure(self, state: State, settlement: Settlement) -> AsyncDCPError:
        location, reason, record = self._storage.info.location, self.give_up.reason, settlement.record
        peers = state is State.ABORTED and record is not None and record.rank not in (None, self._job.rank)
        if state is State.UNKNOWN:
            error: AsyncDCPError = commit_unknown(location, reason.error if reason else None)
        elif record is not None and peers and (reason is None or reason.kind == "deadline"):
            error = peer_error(record, location)  # a deadline is somebody's fault, and the Record says whose
        elif reason is not None and not isinstance(reason.error, CommitUnknown):
            return reason.error
        else:  # the claim of the commit was not heard of, and then an abort won
            cause = record.cause if record else "unknown"
            error = SaveAborted(f"the save to {location} was given up: {cause}", path=location)
        error.__cause__ = reason.error if reason else None
        return error


async def delete_saves(storage: Storage, save_ids: Sequence[str]) -> None:
    """Removes what a commit took the place of: data first, Records last, so that what remains is always explained."""
    names = await storage.list()
    files = [name for name in names for save_id in save_ids if belongs_to(name, save_id)]
    records = {record_name(save_id) for save_id in save_ids}
    await storage.delete([name for name in files if name not in records])
    await storage.delete([name for name in files if name in records])


@contextmanager
def _logged(what: str) -> Iterator[None]:
    """Cleaning up goes on, whatever fails."""
    try:
        with cancelled_by_others():
            yield
    except Exception as error:  # noqa: BLE001  # what the save came to is what the caller is told
        _logger.warning("%s: %r", what, error)
