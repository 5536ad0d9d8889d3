"""A storage that fails or hangs where a test says, and what is left on it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import pytest

from asyncdcp.envelope import decode_record
from asyncdcp.metadata import Record
from asyncdcp.names import belongs_to, record_name
from asyncdcp.storage import MemoryStorage, ObjectWriter
from tests.pipeline.forge import SAVE, Arrays
from tests.work import LONG

Hook = Callable[[int], Awaitable[None]]
"""Awaited before a call, with the number of calls of that kind before it."""

ARRAYS: Arrays = {"w": np.arange(20_000, dtype=np.float32), "b": np.arange(5, dtype=np.int8)}


class Staged(MemoryStorage):
    """Awaits a hook before (``"put"``) or after (``"put!"``) each operation of that name."""

    def __init__(self, **hooks: Hook) -> None:
        super().__init__("there")
        self.hooks = hooks
        self.calls: list[str] = []

    async def on(self, operation: str) -> None:
        self.calls.append(operation)
        if hook := self.hooks.get(operation):
            await hook(self.calls.count(operation) - 1)

    async def create(self, name: str, length_hint: int) -> Any:
        await self.on("create")
        return _Writer(await super().create(name, length_hint), self)

    async def put(self, name: str, data: bytes) -> None:
        await self.on("put")
        assert await super().claim(name, data)
        await self.on("put_done")

    async def claim(self, name: str, data: bytes) -> bool:
        await self.on("claim_commit" if b'"outcome":"commit"' in data else "claim_abort")
        won = await super().claim(name, data)
        await self.on("claimed")
        return won

    async def barrier(self) -> None:
        await self.on("barrier")

    async def list(self) -> dict[str, int]:
        await self.on("list")
        return await super().list()

    async def delete(self, names: Sequence[str]) -> None:
        await self.on("delete")
        await super().delete(names)


class _Writer:
    def __init__(self, inner: ObjectWriter, storage: Staged) -> None:
        self._inner = inner
        self._storage = storage

    alignment = 4096

    async def write(self, offset: int, buffer: memoryview) -> None:
        assert offset % 4096 == len(buffer) % 4096 == 0
        await self._storage.on("write")
        await self._inner.write(offset, buffer)

    async def finish(self, length: int) -> None:
        await self._storage.on("finish")
        await self._inner.finish(length)

    async def abort(self) -> None:
        await self._inner.abort()
        await self._storage.on("abort")


def fails(error: Exception, at: int = 0) -> Hook:
    async def hook(number: int) -> None:
        if number == at:
            raise error

    return hook


def record_in(storage: MemoryStorage, save_id: str = SAVE) -> Record | None:
    data = storage._objects.get(record_name(save_id))
    return decode_record(data, "r") if data else None


def nothing_is_left(storage: MemoryStorage) -> None:
    assert not storage._unfinished
    assert not [name for name in storage._objects if belongs_to(name, SAVE) and name != record_name(SAVE)]


async def is_waited_for(function: str, work: Coroutine[Any, Any, object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Cancels a task that does ``work`` while a thread is in ``function``; whether that had ended when the task had."""
    entered, leave, left = asyncio.Event(), threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slow(*_: object) -> list[int]:
        loop.call_soon_threadsafe(entered.set)
        assert leave.wait(LONG)
        left.set()
        return []

    monkeypatch.setattr(function, slow)
    task = asyncio.create_task(work)
    await entered.wait()
    task.cancel()
    loop.call_later(0.01, leave.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    return left.is_set()
