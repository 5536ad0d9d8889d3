from __future__ import annotations

from typing import Any

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


async def test_what_another_thread_puts_meanwhile_disturbs_no_listing() -> None:
    storage = MemoryStorage()

    class Slow(bytes):
        """Something happens while it is looked at."""

        def __len__(self) -> int:
            storage._objects["late"] = b""
            return super().__len__()

    storage._objects["a"] = Slow(b"abc")
    assert await storage.list() == {"a": 3}
    assert list(await storage.list()) == ["a", "late"]


async def test_of_two_threads_that_claim_a_name_at_once_one_wins() -> None:
    storage = MemoryStorage()

    class Overtaken(dict[str, Any]):
        """Another one claims the name when it was just seen to be free."""

        def __contains__(self, name: object) -> bool:
            storage._objects["a"] = b"theirs"
            return False

    storage._unfinished = Overtaken()
    assert not await storage.claim("a", b"ours")
    assert await storage.get("a", 10) == b"theirs"
