"""What the port promises, of every Storage."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest

from asyncdcp.errors import Closed, CorruptCheckpoint, InvalidOption, StorageError, UsageError
from asyncdcp.storage import LocalStorage, MemoryStorage, ObjectWriter, Storage

pytestmark = pytest.mark.usefixtures("no_leaks")

KIB = 1024
Bounce = Callable[[bytes], memoryview]


@pytest.fixture(params=["direct", "buffered", "shm", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "memory":
        yield MemoryStorage()
    elif request.param == "shm":
        if not os.path.isdir("/dev/shm"):
            pytest.skip("no /dev/shm")
        path = tempfile.mkdtemp(dir="/dev/shm")
        yield LocalStorage(f"{path}/deep/place")
        shutil.rmtree(path)
    else:
        yield LocalStorage(tmp_path / "deep" / "place", direct_io=request.param == "direct")


async def write(writer: ObjectWriter, data: bytes, aligned: Bounce, step: int = 64 * KIB) -> None:
    """Writes all pieces at once, the last one padded, last first."""
    pieces = range(0, len(data), step)
    async with asyncio.TaskGroup() as group:
        for offset in reversed(pieces):
            piece = data[offset : offset + step]
            group.create_task(writer.write(offset, aligned(piece.ljust(-(-len(piece) // 4096) * 4096, b"#"))))
    await writer.finish(len(data))


async def stored(storage: Storage, name: str, data: bytes, aligned: Bounce, hint: int = 0) -> None:
    await write(await storage.create(name, hint), data, aligned)


@pytest.mark.parametrize("length", [0, 1, 4096, 64 * KIB + 1, 300_001])
@pytest.mark.parametrize("hint", [0, 1000, 1_000_000])
async def test_bytes_come_back(storage: Storage, aligned: Bounce, length: int, hint: int) -> None:
    data = os.urandom(length)
    await stored(storage, "a.bin", data, aligned, hint)
    await storage.barrier()
    assert await storage.get("a.bin", length) == data
    assert await storage.list() == {"a.bin": length}


async def test_ranges_never_written_are_zeros(storage: Storage, aligned: Bounce) -> None:
    writer = await storage.create("a", 100)
    await writer.write(8192, aligned(b"x" * 4096))
    await writer.finish(20_000)
    assert await storage.get("a", 20_000) == bytes(8192) + b"x" * 4096 + bytes(20_000 - 12288)


@pytest.mark.parametrize("offset", [0, 4096, 5, 299_000])
async def test_reads_of_any_alignment(storage: Storage, aligned: Bounce, offset: int) -> None:
    data = os.urandom(300_001)
    await stored(storage, "a", data, aligned)
    reader = await storage.open("a")
    assert reader.size == len(data)
    buffers = [memoryview(bytearray(n)) for n in (0, 7, 500)] + [aligned(bytes(60))]
    assert await reader.read(offset, buffers) == 567
    assert b"".join(buffers) == data[offset : offset + 567]
    assert await reader.read(offset, []) == 0
    await reader.aclose()


@pytest.mark.parametrize("cached", [True, False])
async def test_an_aligned_read_reaches_past_the_end(storage: Storage, aligned: Bounce, cached: bool) -> None:
    data = os.urandom(100_001)
    await stored(storage, "a", data, aligned)
    reader = await storage.open("a")
    buffers = [aligned(bytes(64 * KIB)), aligned(bytes(64 * KIB))]
    if not cached or not await reader.read_cached(0, buffers):
        assert await reader.read(0, buffers) == len(data)
    assert b"".join(buffers)[: len(data)] == data
    assert await reader.read(98304, buffers) == len(data) - 98304
    assert bytes(buffers[0][: len(data) - 98304]) == data[98304:]
    assert await reader.read(len(data), buffers) == await reader.read(1 << 40, buffers) == 0
    await reader.aclose()


async def test_many_small_buffers_in_one_read(storage: Storage, aligned: Bounce) -> None:
    data = os.urandom(5000)
    await stored(storage, "a", data, aligned)
    reader = await storage.open("a")
    buffers = [memoryview(bytearray(1)) for _ in range(5000)]
    assert await reader.read(0, buffers) == 5000
    assert b"".join(buffers) == data
    assert not await reader.read_cached(0, buffers) or b"".join(buffers) == data
    await reader.aclose()


async def test_a_closed_reader_and_writer_refuse(storage: Storage, aligned: Bounce) -> None:
    await stored(storage, "a", b"abc", aligned)
    reader = await storage.open("a")
    await reader.aclose()
    await reader.aclose()
    for read in (reader.read, reader.read_cached):
        with pytest.raises(Closed):
            await read(0, [aligned(b"x")])
    writer = await storage.create("b", 0)
    await writer.finish(0)
    with pytest.raises(Closed):
        await writer.write(0, aligned(b"x" * 4096))
    with pytest.raises(Closed):
        await writer.finish(0)


async def test_negative_numbers_are_refused(storage: Storage, aligned: Bounce) -> None:
    writer = await storage.create("a", 0)
    with pytest.raises(InvalidOption):
        await writer.write(-4096, aligned(bytes(4096)))
    with pytest.raises(InvalidOption):
        await writer.finish(-1)
    await writer.finish(0)
    reader = await storage.open("a")
    with pytest.raises(InvalidOption):
        await reader.read(-1, [aligned(b"x")])
    await reader.aclose()


async def test_what_exists_is_not_made_again(storage: Storage) -> None:
    await storage.put("a", b"first")
    with pytest.raises(FileExistsError) as caught:
        await storage.put("a", b"second")
    assert not isinstance(caught.value, StorageError)
    with pytest.raises(FileExistsError):
        await storage.create("a", 10)
    assert await storage.claim("a", b"third") is False
    assert await storage.get("a", 5) == b"first"
    assert await storage.list() == {"a": 5}


async def test_what_is_missing(storage: Storage) -> None:
    assert await storage.list() == {}
    await storage.barrier()
    await storage.delete(["a", "b"])
    for missing in (storage.get("a", 1), storage.open("a")):
        with pytest.raises(FileNotFoundError):
            await missing


async def test_get_keeps_its_limit(storage: Storage) -> None:
    await storage.put("a", b"12345")
    with pytest.raises(CorruptCheckpoint, match="5 bytes"):
        await storage.get("a", 4)


async def test_abort_leaves_nothing_and_frees_the_name(storage: Storage, aligned: Bounce) -> None:
    writer = await storage.create("a", 10_000)
    await writer.write(0, aligned(bytes(4096)))
    with pytest.raises(FileExistsError):
        await storage.create("a", 0)
    await writer.abort()
    await writer.abort()
    assert await storage.list() == {}
    await storage.put("a", b"new")
    await writer.abort()
    assert await storage.get("a", 3) == b"new"


async def test_abort_after_finish_does_nothing(storage: Storage) -> None:
    writer = await storage.create("a", 0)
    await writer.finish(0)
    await writer.abort()
    assert await storage.list() == {"a": 0}


async def test_delete_passes_over_what_is_gone(storage: Storage) -> None:
    await storage.put("a", b"1")
    await storage.put("b", b"2")
    await storage.delete(["x", "a", "y"])
    await storage.barrier()
    assert await storage.list() == {"b": 1}


async def test_of_many_claims_one_wins(storage: Storage) -> None:
    async with asyncio.TaskGroup() as group:
        claims = [group.create_task(storage.claim("r", b"%d" % n)) for n in range(20)]
    winners = [n for n, claim in enumerate(claims) if claim.result()]
    assert len(winners) == 1
    assert await storage.get("r", 10) == b"%d" % winners[0]


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "/a", "a b", "ä", "a\0", "a\n", "a" * 201])
async def test_bad_names_are_refused(storage: Storage, name: str) -> None:
    for call in (
        storage.create(name, 0),
        storage.put(name, b""),
        storage.claim(name, b""),
        storage.get(name, 1),
        storage.open(name),
        storage.delete(["fine", name]),
    ):
        with pytest.raises(InvalidOption, match="name"):
            await call


async def test_the_longest_name_is_served(storage: Storage) -> None:
    assert await storage.claim("a" * 200, b"x")
    assert await storage.get("a" * 200, 1) == b"x"


@pytest.mark.parametrize("native", [True, False])
async def test_cancelled_methods_leave_no_open_file(storage: Storage, aligned: Bounce, native: bool) -> None:
    async def work() -> None:
        writer = await storage.create("a", 1 << 20)
        try:
            await write(writer, bytes(1 << 20), aligned)
        except BaseException:
            await writer.abort()
            raise

    for turns in range(12):
        with anyio.CancelScope() as scope:
            task = asyncio.create_task(work()) if native else None
            if task is None:
                asyncio.get_running_loop().call_soon(scope.cancel)
                await work()
            else:
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
        if (await storage.list()).get("a") is not None:
            assert await storage.get("a", 1 << 20) == bytes(1 << 20)
        await storage.delete(["a"])


async def test_finish_refuses_after_a_cancelled_write(storage: Storage, aligned: Bounce) -> None:
    writer = await storage.create("a", 0)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await writer.write(0, aligned(bytes(4096)))
    with pytest.raises(StorageError, match="failed"):
        await writer.finish(4096)
    await writer.abort()
    assert await storage.list() == {}


async def test_info(storage: Storage) -> None:
    info = storage.info
    assert info.location and info.filesystem
    assert info.volatile == (info.filesystem in ("memory", "tmpfs"))


async def test_usage_errors_are_the_callers(storage: Storage) -> None:
    with pytest.raises(UsageError):
        await storage.get("/etc/passwd", 1000)


async def test_fetch_reads_one_way_or_the_other_and_hands_on_what_comes_of_it(
    storage: Storage, aligned: Bounce
) -> None:
    data = os.urandom(50_000)
    await stored(storage, "a", data, aligned)
    reader = await storage.open("a")
    cached, otherwise = aligned(bytes(64 * KIB)), aligned(bytes(64 * KIB))

    def then(found: bool) -> bytes:
        return bytes((cached if found else otherwise)[: len(data)])

    assert await reader.fetch(0, [cached], [otherwise], then) == data

    def fail(found: bool) -> None:
        raise LookupError("the caller's")

    with pytest.raises(LookupError, match="the caller's"):
        await reader.fetch(0, [cached], [otherwise], fail)
    await reader.aclose()
    with pytest.raises(Closed):
        await reader.fetch(0, [cached], [otherwise], then)
