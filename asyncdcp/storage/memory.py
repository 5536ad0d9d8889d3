"""Objects in memory: a Storage for tests and small things, with the semantics of a directory and none of its delays;
and the warning that checkpoints will not outlive the machine's next restart, where a path is kept in memory.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence

from anyio import CapacityLimiter
from anyio.lowlevel import checkpoint

from asyncdcp.errors import CorruptCheckpoint, StorageError, VolatileStorageWarning
from asyncdcp.storage.place import Contents, Found, Selects, Survey
from asyncdcp.storage.port import (
    Buffer,
    Fetch,
    Storage,
    StorageInfo,
    already_there,
    check_length,
    check_name,
    check_use,
)
from asyncdcp.threads import on_thread
from asyncdcp.warn import warn_caller


class MemoryStorage:
    """A ``Storage`` that lives as long as the instance. Unfinished objects are invisible, but their names are taken.
    Several checkpointers, each on a thread of its own, may use one.

    >>> with asyncdcp.SyncCheckpointer(process=False) as checkpointer:
    ...     storage = asyncdcp.MemoryStorage()
    ...     _ = checkpointer.save(storage, {"weight": torch.ones(3)})
    ...     print(checkpointer.load(storage))
    {'weight': tensor([1., 1., 1.])}
    """

    def __init__(self, name: str = "memory") -> None:
        self._info = StorageInfo(name, "memory", volatile=True)
        self._objects: dict[str, bytes] = {}
        self._unfinished: dict[str, MemoryWriter] = {}

    @property
    def info(self) -> StorageInfo:
        return self._info

    async def create(self, name: str, length_hint: int) -> MemoryWriter:
        await self._begin(name)
        if self._taken(name):
            raise already_there(self._path_of(name))
        writer = self._unfinished[name] = MemoryWriter(self._path_of(name), self._objects, self._unfinished)
        return writer

    async def put(self, name: str, data: bytes) -> None:
        if not await self.claim(name, data):
            raise already_there(self._path_of(name))

    async def claim(self, name: str, data: bytes) -> bool:
        await self._begin(name)
        own = bytes(data)
        if self._taken(name):
            return False
        return self._objects.setdefault(name, own) is own

    async def barrier(self) -> None:
        await checkpoint()

    async def get(self, name: str, limit: int) -> bytes:
        data = await self._find(name)
        check_length(self._path_of(name), len(data), limit)
        return data

    async def open(self, name: str) -> MemoryReader:
        return MemoryReader(self._path_of(name), await self._find(name))

    async def list(self) -> dict[str, int]:
        await checkpoint()
        return {name: len(data) for name, data in list(self._objects.items())}

    async def temporaries(self) -> dict[str, str]:
        await checkpoint()
        return {}  # what is unfinished dies with the process, and its name is deleted as an object's

    async def delete(self, names: Sequence[str]) -> None:
        for name in names:
            check_name(name)
        await checkpoint()
        for name in names:
            self._objects.pop(name, None)
            self._unfinished.pop(name, None)

    async def _begin(self, name: str) -> None:
        check_name(name)
        await checkpoint()

    async def _find(self, name: str) -> bytes:
        await self._begin(name)
        try:
            return self._objects[name]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._path_of(name)) from None

    def _taken(self, name: str) -> bool:
        return name in self._objects or name in self._unfinished

    def _path_of(self, name: str) -> str:
        return f"{self._info.location}/{name}"


class MemoryWriter:
    """An ``ObjectWriter`` whose bytes become an object by ``finish``."""

    def __init__(self, path: str, objects: dict[str, bytes], unfinished: dict[str, MemoryWriter]) -> None:
        self._path = path
        self._name = path.rpartition("/")[2]
        self._objects = objects
        self._unfinished = unfinished
        self._data = bytearray()
        self._failed = False

    @property
    def alignment(self) -> int:
        return 1

    async def write(self, offset: int, buffer: Buffer) -> None:
        self._check("offset", offset)
        try:
            await checkpoint()
        except BaseException:
            self._failed = True
            raise
        self._check("offset", offset)
        end = offset + len(buffer)
        self._data.extend(bytes(max(0, end - len(self._data))))
        self._data[offset:end] = buffer

    async def finish(self, length: int) -> None:
        self._check("length", length)
        if self._failed:
            raise StorageError(f"cannot finish {self._path}: a write of it failed", path=self._path)
        await checkpoint()
        self._check("length", length)
        self._objects[self._name] = bytes(self._data[:length]).ljust(length, b"\0")
        del self._unfinished[self._name]

    async def abort(self) -> None:
        if self._unfinished.get(self._name) is self:
            del self._unfinished[self._name]

    def _check(self, what: str, value: int) -> None:
        check_use(self._path, what, value, is_open=self._unfinished.get(self._name) is self)


class MemoryReader:
    """An ``ObjectReader``; what it reads stays as it was when it was opened."""

    def __init__(self, path: str, data: bytes) -> None:
        self._path = path
        self._data = memoryview(data)
        self._open = True

    @property
    def size(self) -> int:
        return len(self._data)

    @property
    def alignment(self) -> int:
        return 1

    async def read(self, offset: int, buffers: Sequence[Buffer]) -> int:
        check_use(self._path, "offset", offset, is_open=self._open)
        await checkpoint()
        start = offset
        for buffer in buffers:
            part = self._data[offset : offset + len(buffer)]
            buffer[: len(part)] = part
            offset += len(part)
        return offset - start

    async def read_cached(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        await self.read(offset, buffers)
        return True

    async def fetch(self, *reads: Fetch) -> None:
        for read in reads:
            found = await self.read_cached(read.offset, read.cached)
            await on_thread(CapacityLimiter(1), read.then, found)  # it may block, and the loop has other work

    async def aclose(self) -> None:
        self._open = False


class MemoryPlace:
    """A ``Place`` that lives as long as the instance. An object counts as changed when a survey first sees it so."""

    def __init__(self, name: str = "memory") -> None:
        self._name = name
        self._storage = self._open("")
        self._children: dict[str, MemoryStorage] = {}
        self._seen: dict[tuple[str, str], Found] = {}

    def _open(self, name: str) -> MemoryStorage:
        return MemoryStorage(f"{self._name}/{name}" if name else self._name)

    @property
    def storage(self) -> MemoryStorage:
        return self._storage

    def child(self, name: str) -> MemoryStorage:
        return self._children.setdefault(check_name(name), self._open(name))

    async def survey(self, selects: Selects, limit: int) -> Survey:
        own = await self._contents("", self._storage, selects, limit)
        children = {
            name: await self._contents(name, child, selects, limit) for name, child in list(self._children.items())
        }
        return Survey(own, {name: contents for name, contents in children.items() if contents.objects})

    async def _contents(self, child: str, storage: MemoryStorage, selects: Selects, limit: int) -> Contents:
        contents = Contents()
        for name, size in (await storage.list()).items():
            before = self._seen.get((child, name))
            now = before if before is not None and before.size == size else Found(size, time.time())
            self._seen[child, name] = contents.objects[name] = now
            if not selects(child, name):
                continue
            try:
                contents.read[name] = await storage.get(name, limit)
            except FileNotFoundError:
                del contents.objects[name]
            except CorruptCheckpoint as error:
                contents.unread[name] = str(error)
        return contents

    async def append(self, name: str, line: bytes) -> None:
        before = await self._storage.get(name, 1 << 30) if name in await self._storage.list() else b""
        await self._storage.delete([name])
        await self._storage.put(name, before + line + b"\n")

    async def discard(self, name: str, temporaries: Sequence[str] = ()) -> None:
        check_name(name)
        await checkpoint()  # an empty sub-place is in no survey, and whoever has it open goes on with the same one


class VolatileWarnings:
    """Of one checkpointer, which warns once of each filesystem that is kept in memory."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def warn_of(self, storage: Storage) -> None:
        """On the thread of the verb that a user has called, and by that verb itself."""
        info = storage.info
        if isinstance(storage, MemoryStorage):
            return  # whoever hands that over knows
        if info.volatile and info.filesystem not in self._told:
            self._told.add(info.filesystem)
            warn_caller(
                f"{info.location} is kept in memory ({info.filesystem}): checkpoints there do not survive "
                "a restart of the machine",
                VolatileStorageWarning,
            )
