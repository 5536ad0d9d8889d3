"""What is promised of bytes: what was written is what is read, of any length, alignment and number of buffers."""

from __future__ import annotations

import os
from typing import Final

from asyncdcp.errors import Closed, CorruptCheckpoint
from asyncdcp.storage import Fetch
from asyncdcp.testing.storage.kit import Check, StorageKit, opened, page_buffer, raises, stored

_KIB: Final = 1024


async def bytes_come_back(kit: StorageKit) -> None:
    """Of any length, with any hint, here and in another instance."""
    for length in (0, 1, 4096, 64 * _KIB + 1, 300_001):
        for hint in (0, 1000, 1_000_000):
            storage, data = kit.make(), os.urandom(length)
            await stored(storage, "a.bin", data, hint)
            await storage.barrier()
            for seen in (storage, kit.again(storage)):
                assert await seen.get("a.bin", length) == data
                assert await seen.list() == {"a.bin": length}


async def ranges_never_written_are_zeros(kit: StorageKit) -> None:
    storage = kit.make()
    writer = await storage.create("a", 100)
    at = -(-8192 // writer.alignment) * writer.alignment
    await writer.write(at, page_buffer(b"x" * writer.alignment * 2))
    written = writer.alignment * 2
    await writer.finish(at + written + 5000)
    assert await storage.get("a", 1 << 20) == bytes(at) + b"x" * written + bytes(5000)


async def reads_of_any_alignment(kit: StorageKit) -> None:
    data, reader = await opened(kit.make(), 300_001)
    assert reader.size == len(data)
    for offset in (0, 4096, 5, 299_000):
        buffers = [memoryview(bytearray(n)) for n in (0, 7, 500)] + [page_buffer(bytes(60))]
        assert await reader.read(offset, buffers) == 567
        assert b"".join(buffers) == data[offset : offset + 567]
        assert await reader.read(offset, []) == 0
    await reader.aclose()


async def an_aligned_read_reaches_past_the_end(kit: StorageKit) -> None:
    data, reader = await opened(kit.make(), 100_001)
    for cached in (True, False):
        buffers = [page_buffer(bytes(64 * _KIB)), page_buffer(bytes(64 * _KIB))]
        if not cached or not await reader.read_cached(0, buffers):
            assert await reader.read(0, buffers) == len(data)
        assert b"".join(buffers)[: len(data)] == data
        assert await reader.read(98304, buffers) == len(data) - 98304
        assert bytes(buffers[0][: len(data) - 98304]) == data[98304:]
        assert await reader.read(len(data), buffers) == await reader.read(1 << 40, buffers) == 0
    await reader.aclose()


async def many_small_buffers_in_one_read(kit: StorageKit) -> None:
    data, reader = await opened(kit.make(), 5000)
    buffers = [memoryview(bytearray(1)) for _ in range(5000)]
    assert await reader.read(0, buffers) == 5000
    assert b"".join(buffers) == data
    assert not await reader.read_cached(0, buffers) or b"".join(buffers) == data
    await reader.aclose()


async def fetch_reads_one_way_or_the_other(kit: StorageKit) -> None:
    """Several reads after one another, each with what it calls, whose errors it hands on."""
    data, reader = await opened(kit.make(), 50_000)
    cached, otherwise = page_buffer(bytes(64 * _KIB)), page_buffer(bytes(64 * _KIB))
    taken: list[bytes] = []

    def then(found: bool) -> None:  # noqa: FBT001  # what the port says
        taken.append(bytes(cached if found else otherwise))

    def fail(found: bool) -> None:  # noqa: FBT001  # what the port says
        raise LookupError("the caller's")

    seen: list[tuple[int, bytes]] = []
    await reader.fetch(Fetch(0, [cached], [otherwise], then, lambda n: seen.append((n, bytes(cached[:n])))))
    assert all(data[:count] == there[: len(data)] for count, there in seen)
    assert [count for count, _ in seen] == sorted({count for count, _ in seen})
    await reader.fetch(Fetch(0, [cached], [otherwise], then), Fetch(4096, [cached], [otherwise], then))
    assert [found[: len(data)] for found in taken[:2]] == [data, data]
    assert taken[2][: len(data) - 4096] == data[4096:]
    with raises(LookupError, "the caller's"):
        await reader.fetch(Fetch(0, [cached], [otherwise], fail), Fetch(0, [cached], [otherwise], then))
    assert len(taken) == 3
    await reader.aclose()
    with raises(Closed):
        await reader.fetch(Fetch(0, [cached], [otherwise], then))


async def get_keeps_its_limit(kit: StorageKit) -> None:
    storage = kit.make()
    await storage.put("a", b"12345")
    assert await storage.get("a", 5) == b"12345"
    with raises(CorruptCheckpoint, "5 bytes"):
        await storage.get("a", 4)


CHECKS: Final[tuple[Check, ...]] = (
    bytes_come_back,
    ranges_never_written_are_zeros,
    reads_of_any_alignment,
    an_aligned_read_reaches_past_the_end,
    many_small_buffers_in_one_read,
    fetch_reads_one_way_or_the_other,
    get_keeps_its_limit,
)
