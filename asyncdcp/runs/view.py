"""One save of a place that may hold several: what a reader sees who was told which one."""

from __future__ import annotations

from collections.abc import Sequence

from asyncdcp.names import belongs_to
from asyncdcp.storage import ObjectReader, ObjectWriter, Storage, StorageInfo


class SaveView:
    """A ``Storage`` that shows the files of one save only, so that it alone can be the checkpoint. Writes pass through.

    Two writers that did not know of each other can commit to one step; the run's lineage says which one counts, and
    the reader is to open that one.
    """

    def __init__(self, storage: Storage, save_id: str) -> None:
        self._storage = storage
        self.save_id = save_id

    @property
    def info(self) -> StorageInfo:
        return self._storage.info

    async def list(self) -> dict[str, int]:
        names = await self._storage.list()
        return {name: size for name, size in names.items() if belongs_to(name, self.save_id)}

    async def get(self, name: str, limit: int) -> bytes:
        return await self._storage.get(name, limit)

    async def open(self, name: str) -> ObjectReader:
        return await self._storage.open(name)

    async def create(self, name: str, length_hint: int) -> ObjectWriter:
        return await self._storage.create(name, length_hint)

    async def put(self, name: str, data: bytes) -> None:
        await self._storage.put(name, data)

    async def claim(self, name: str, data: bytes) -> bool:
        return await self._storage.claim(name, data)

    async def barrier(self) -> None:
        await self._storage.barrier()

    async def temporaries(self) -> dict[str, str]:
        found = await self._storage.temporaries()
        return {name: target for name, target in found.items() if belongs_to(target, self.save_id)}

    async def delete(self, names: Sequence[str]) -> None:
        await self._storage.delete(names)
