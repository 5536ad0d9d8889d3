"""A place in memory, for tests and small things."""

from __future__ import annotations

import time
from collections.abc import Sequence

from anyio.lowlevel import checkpoint

from asyncdcp.errors import CorruptCheckpoint
from asyncdcp.storage.memory import MemoryStorage
from asyncdcp.storage.place import Contents, Found, Selects, Survey
from asyncdcp.storage.port import check_name


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
