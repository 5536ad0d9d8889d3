"""An object being read: one ranged GET for each read, sent again from where it broke off."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from anyio import CapacityLimiter
from anyio.lowlevel import checkpoint
from obstore.exceptions import PreconditionError

from asyncdcp.errors import StorageError
from asyncdcp.storage.files import address
from asyncdcp.storage.object_store.failures import again, translated
from asyncdcp.storage.object_store.url import ObjectURL
from asyncdcp.storage.port import Buffer, Fetch, check_use
from asyncdcp.storage.spec import RequestLimits
from asyncdcp.threads import on_thread

if TYPE_CHECKING:
    from obstore import Bytes, GetOptions, ObjectMeta
    from obstore.store import ObjectStore

_LONG: Final = 64 << 10
"""Copies at least so long are made without the GIL."""


@dataclass(frozen=True)
class Source:
    """Where an object comes from."""

    url: ObjectURL
    name: str
    store: ObjectStore
    limits: RequestLimits

    async def get(self, options: GetOptions) -> Bytes | bytes:
        """obstore goes on where a body broke off, if the object is still the same."""
        found = await self.store.get_async(self.url.key(self.name), options=options)
        return await found.bytes_async()


class ObjectStoreReader:
    """An ``ObjectReader``. It reads the object that was there when it was opened, or fails."""

    def __init__(self, source: Source, meta: ObjectMeta, limiter: CapacityLimiter) -> None:
        self._source = source
        self._path = f"{source.url}/{source.name}"
        self._meta = meta
        self._limiter = limiter
        self._open = True

    @property
    def size(self) -> int:
        return self._meta["size"]

    @property
    def alignment(self) -> int:
        return 1

    async def read(self, offset: int, buffers: Sequence[Buffer]) -> int:
        data = await self._get(offset, sum(map(len, buffers)))
        await on_thread(self._limiter, scatter, data, buffers)
        return len(data)

    async def read_cached(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        self._check(offset)
        await checkpoint()
        return False

    async def fetch(self, *reads: Fetch) -> None:
        for read in reads:
            data = await self._get(read.offset, sum(map(len, read.cached)))
            await on_thread(self._limiter, _hand_on, data, read)

    async def aclose(self) -> None:
        self._open = False

    async def _get(self, offset: int, length: int) -> memoryview:
        """The bytes from ``offset`` on, as far as there are some."""
        self._check(offset)
        end = min(offset + length, self.size)
        if end <= offset:
            await checkpoint()
            return memoryview(b"")
        options: GetOptions = {"range": (offset, end)}
        if self._meta["e_tag"] is not None:
            options["if_match"] = self._meta["e_tag"]
        source = self._source
        data: Bytes | bytes = b""
        with translated("read", source.url, source.name):
            try:
                data = await again(source.limits, lambda: source.get(options))
            except PreconditionError as error:
                message = f"{self._path} is another object than when it was opened"
                raise StorageError(message, path=self._path) from error
        if len(data) != end - offset:
            raise EOFError(f"{self._path} gave {len(data)} bytes at {offset}, and {end - offset} were asked for")
        return memoryview(data)

    def _check(self, offset: int) -> None:
        check_use(self._path, "offset", offset, is_open=self._open)


def _hand_on(data: memoryview, read: Fetch) -> None:
    scatter(data, read.cached)
    read.then(True)  # noqa: FBT003  # as the port has it


def scatter(data: memoryview, buffers: Sequence[Buffer]) -> None:
    """Copies ``data`` to the buffers, one after another."""
    position = 0
    for buffer in buffers:
        piece = data[position : position + len(buffer)]
        if len(piece) < _LONG:
            buffer[: len(piece)] = piece
        else:
            ctypes.memmove(address(buffer), address(piece), len(piece))
        position += len(piece)
