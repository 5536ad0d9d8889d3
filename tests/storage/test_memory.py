from __future__ import annotations

import pytest

from asyncdcp.errors import Closed
from asyncdcp.storage import MemoryStorage, Storage


async def test_unfinished_objects_are_invisible_and_their_names_taken() -> None:
    storage: Storage = MemoryStorage("here")
    writer = await storage.create("a", 3)
    await writer.write(1, memoryview(b"yz"))
    assert await storage.list() == {}
    with pytest.raises(FileNotFoundError):
        await storage.get("a", 3)
    assert await storage.claim("a", b"") is False
    await writer.finish(2)
    assert await storage.get("a", 3) == b"\0y"
    assert storage.info.location == "here" and storage.info.volatile


async def test_a_reader_keeps_what_it_opened() -> None:
    storage = MemoryStorage()
    await storage.put("a", b"old")
    reader = await storage.open("a")
    await storage.delete(["a"])
    buffer = memoryview(bytearray(3))
    assert await reader.read_cached(0, [buffer])
    assert bytes(buffer) == b"old"


async def test_deleting_an_unfinished_object_ends_it() -> None:
    storage = MemoryStorage()
    writer = await storage.create("a", 0)
    await storage.delete(["a"])
    with pytest.raises(Closed):
        await writer.finish(0)
