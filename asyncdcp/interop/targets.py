"""What a conversion can write: a checkpoint of asyncdcp's own, Hugging Face's files; elsewhere, by the same rules, a
``.pt`` file and a DCP directory.

A native checkpoint is committed as any other, and removed if it then turns out not to hold what was written. The rest
is written beside its place under a name that ends in ``.partial``, read back there, and renamed.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import anyio
from anyio import to_thread

from asyncdcp.arena import Arena
from asyncdcp.boxes import whole
from asyncdcp.checkpointer.jobs import make_job
from asyncdcp.config import Options
from asyncdcp.envelope import encode_record
from asyncdcp.errors import AsyncDCPError, Cancelled, CheckpointExists, InvalidOption, UnsupportedFormat, UsageError
from asyncdcp.format.blocks import SLAB_BYTES
from asyncdcp.format.image import SAFETENSORS_DTYPES
from asyncdcp.interop.huggingface import INDEX_SUFFIX, encode_weight_index, shard_names
from asyncdcp.interop.selection import Selection
from asyncdcp.interop.streaming import Digests, Fill, whole_tensor, write_plan
from asyncdcp.names import file_save_id, make_save_id, record_name
from asyncdcp.pipeline.formats import ReadableCheckpoint
from asyncdcp.pipeline.messages import SaveJob, SlabReady
from asyncdcp.pipeline.records import abort_record
from asyncdcp.pipeline.session import LocalSession, SessionRequest
from asyncdcp.planning import ChunkSpec, SavePlan, Slab, Structure, TensorSpec
from asyncdcp.planning.save_plan import plan_save
from asyncdcp.slot_ring import SlotRing
from asyncdcp.storage import LocalStorage, ObjectWriter, Storage
from asyncdcp.storage.files import REFUSED, io_buffer, sync_directory, translated
from asyncdcp.storage.posix import SYSTEM
from asyncdcp.threads import ended
from asyncdcp.trace import Trace
from asyncdcp.unwinding import ungrouped

SHARD_BYTES: Final = 5 * 10**9
"""The size of a shard where none is asked for: Hugging Face's own default."""
_SLOTS: Final = 6
_FORGETTING: Final = 10.0
"""Seconds for the last traces of what failed."""

_logger = logging.getLogger("asyncdcp")

Written = dict[str, bytes]
"""XXH3-128 of the bytes of each tensor that was written, by its name."""
ReadBack = Callable[[Storage, Written], Awaitable[None]]
"""Raises if what is at a place is not what was written to it."""


class _Ring:
    """A few slots of one slab each, in shared memory."""

    def __init__(self) -> None:
        self.arena = Arena(_SLOTS, SLAB_BYTES)
        self.slots = SlotRing(_SLOTS)


# ── asyncdcp's own ──


async def write_native(
    reader: ReadableCheckpoint, selection: Selection, storage: Storage, read_back: ReadBack, metadata: dict[str, Any]
) -> None:
    """Commits a checkpoint of one rank. Raises as a save does, and leaves nothing then."""
    plan = _plan(selection, None)
    location = storage.info.location
    job = make_job(
        make_save_id(uuid.uuid4().hex, location, 1),
        plan,
        selection.values,
        Options().save_deadline,
        overwrite=False,
        metadata=metadata,
    )
    ring = _Ring()
    session = LocalSession(SessionRequest(job, storage, ring.arena, ring.slots.release, Trace()))
    sink = _SessionSink(session, ring)
    found: list[Digests] = []

    async def feed() -> None:
        try:
            found.append(await write_plan(reader, plan, selection.tensors, sink))
        except AsyncDCPError as error:
            session.give_up("failed", error)  # and ``run`` raises it, once nothing of the save is left
        else:
            await session.staging_done()

    try:
        async with _traceless(storage, job):
            with ungrouped():
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(feed)
                    await session.run()
            await read_back(storage, _by_name(plan, found[0]))
    finally:
        ring.arena.close()


@asynccontextmanager
async def _traceless(storage: Storage, job: SaveJob) -> AsyncIterator[None]:
    """Around a save that nobody else takes part in. If it comes to nothing, all that it wrote is taken away, and the
    folders that were made for it.
    """
    folder = anyio.Path(storage.info.location)
    made = []
    if isinstance(storage, LocalStorage):
        made = [path for path in (folder, *folder.parents) if not await path.exists()]
    try:
        yield
    except BaseException:
        await ended(asyncio.ensure_future(_forget(storage, job)))
        with suppress(OSError), anyio.CancelScope(shield=True):
            for path in made:
                await path.rmdir()
        raise


async def _forget(storage: Storage, job: SaveJob) -> None:
    """Removes the Record, which tells the others, before what it tells of. Where there is none, an abort takes its name
    first: a commit may be on its way.
    """
    record, location = record_name(job.save_id), storage.info.location
    try:
        with anyio.fail_after(_FORGETTING):
            own = [name for name in await storage.list() if file_save_id(name) == job.save_id]
            if own and record not in own:
                abort = abort_record(job.save_id, (0, 1), Cancelled("the conversion was given up"), job.versions)
                await storage.claim(record, encode_record(abort))
            if own:
                await storage.delete([record])
                await storage.barrier()
                await storage.delete([name for name in own if name != record])
    except (OSError, AsyncDCPError) as error:
        _logger.warning("%s: what was written there could not be removed: %s", location, error)


class _SessionSink:
    def __init__(self, session: LocalSession, ring: _Ring) -> None:
        self._session = session
        self._ring = ring

    async def put(self, slab: Slab, fill: Fill) -> None:
        _, slot = await self._ring.slots.acquire()
        await to_thread.run_sync(fill, self._ring.arena.slot(slot)[: slab.length])
        await self._session.announce(SlabReady(slab.file, slab.begin // SLAB_BYTES, slot, slab.length))


# ── Hugging Face ──


async def write_huggingface(
    reader: ReadableCheckpoint, selection: Selection, path: Path, read_back: ReadBack, shard_bytes: int
) -> None:
    """A directory with ``model.safetensors``, or shards of at most ``shard_bytes`` (or of one larger tensor) with their
    index. Tensors only: plain values have no place there, and of tied tensors one name is kept.
    """
    for tensor in selection.tensors:
        if tensor.dtype not in SAFETENSORS_DTYPES:
            raise UnsupportedFormat(
                f"{tensor.name} has dtype {tensor.dtype}, which safetensors files do not know; leave it out by keys",
                tensors=[tensor.name],
            )
    if not selection.tensors:
        raise InvalidOption("there is no tensor to write, and Hugging Face's files hold nothing else")
    plan = _plan(selection, shard_bytes)
    names = shard_names(len(plan.images))
    with replacing(path) as scratch:
        storage = LocalStorage(scratch)
        async with _FileSink(storage, plan, names) as sink:
            digests = await write_plan(reader, plan, selection.tensors, sink)
        if len(plan.images) > 1:
            places = {
                selection.tensors[plan.chunks[chunk].tensor].name: name
                for name, image in zip(names, plan.images, strict=True)
                for chunk in image.chunks
            }
            await storage.put(f"model{INDEX_SUFFIX}", encode_weight_index(places, plan.tensor_bytes))
        await storage.barrier()
        await read_back(storage, _by_name(plan, digests))


class _FileSink:
    """Writes the images of a plan to files, several slabs at once. Each is finished with its last slab, all of them
    where the block ends well.
    """

    def __init__(self, storage: Storage, plan: SavePlan, names: list[str]) -> None:
        self._storage = storage
        self._plan = plan
        self._names = names
        self._free = [io_buffer(SLAB_BYTES) for _ in range(_SLOTS)]
        self._limit = anyio.Semaphore(_SLOTS)
        self._writers: dict[int, ObjectWriter] = {}
        self._left = Counter(slab.file for slab in plan.slabs)
        self._tasks = anyio.create_task_group()

    async def __aenter__(self) -> _FileSink:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            with ungrouped():
                await self._tasks.__aexit__(kind, error, traceback)
        finally:
            with anyio.CancelScope(shield=True):
                async with AsyncExitStack() as stack:  # of which each is called, whatever the others raise
                    for writer in self._writers.values():
                        stack.push_async_callback(writer.abort)

    async def put(self, slab: Slab, fill: Fill) -> None:
        if slab.file not in self._writers:
            size = self._plan.images[slab.file].size
            self._writers[slab.file] = await self._storage.create(self._names[slab.file], size)
        await self._limit.acquire()
        buffer = self._free.pop()
        await to_thread.run_sync(fill, buffer[: slab.length])
        self._tasks.start_soon(self._write, slab, buffer)

    async def _write(self, slab: Slab, buffer: memoryview) -> None:
        writer = self._writers[slab.file]
        length = -(-slab.length // writer.alignment) * writer.alignment
        await writer.write(slab.begin, buffer[:length])
        self._free.append(buffer)
        self._limit.release()
        self._left[slab.file] -= 1
        if not self._left[slab.file]:  # now, so that there are no more open files than there are shards under way
            await writer.finish(self._plan.images[slab.file].size)


# ── what they share ──


def _plan(selection: Selection, file_limit: int | None) -> SavePlan:
    """One rank's plan of all tensors, each whole; ``file_limit`` is kept but where one tensor is larger."""
    specs = tuple(TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in selection.tensors)
    chunks = tuple(ChunkSpec(number, whole(spec.shape)) for number, spec in enumerate(specs))
    structure = Structure(specs, chunks, selection.aliases, selection.tree)
    if file_limit is None:
        return plan_save(structure)
    largest = max((whole_tensor(tensor).nbytes for tensor in selection.tensors), default=0)
    return plan_save(structure, file_limit=max(file_limit, largest))


def _by_name(plan: SavePlan, digests: Digests) -> Written:
    """Of tensors that are one chunk; those that had to be split over files are left to their checkpoint's checksums."""
    parts: dict[int, list[int]] = {}
    for number, chunk in enumerate(plan.chunks):
        parts.setdefault(chunk.tensor, []).append(number)
    names = plan.structure.tensors
    return {names[tensor].name: digests.found[own[0]] for tensor, own in parts.items() if len(own) == 1}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to. What is there when the block ends well gets the name ``path``; else it is
    removed, and the error names ``path``. ``CheckpointExists`` if something has that name already, or has got it by
    then.
    """
    if path.exists() or path.is_symlink():
        raise _exists(path)
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path.absolute().parent} is no directory; make it first", path=str(path))
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield scratch
        _give_name(scratch, path)
        sync_directory(path.absolute().parent)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):  # it was that directory, or is not there
            scratch.unlink()
        if isinstance(error, AsyncDCPError):
            error.args = (str(error).replace(str(scratch), str(path)),)
            error.path = error.path and error.path.replace(str(scratch), str(path))
        raise


def _give_name(scratch: Path, path: Path) -> None:
    """Whatever has got the name meanwhile keeps it, where the filesystem can see to that."""
    with translated("rename to", str(path), FileExistsError):
        try:
            SYSTEM.rename_noreplace(str(scratch), str(path))
        except FileExistsError as error:
            raise _exists(path) from error
        except OSError as error:
            if error.errno not in REFUSED | {errno.ENOSYS}:
                raise
            os.rename(scratch, path)


def _exists(path: Path) -> CheckpointExists:
    return CheckpointExists(f"{path} exists; choose another name, or remove it first", path=str(path))
