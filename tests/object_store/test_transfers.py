"""Uploads and reads over a network that fails: nothing lost, no false success, and only so much memory."""

from __future__ import annotations

import asyncio
import hashlib
import mmap
import os
from collections import deque
from collections.abc import AsyncIterator, Callable

import anyio
import numpy as np
import pytest

from asyncdcp.errors import StorageError, StorageUnavailable
from asyncdcp.storage.object_store import ObjectStorage
from asyncdcp.storage.object_store import writer as writing
from asyncdcp.storage.object_store.writer import PARTS_AHEAD, PARTS_IN_FLIGHT
from asyncdcp.unwinding import ungrouped
from tests.object_store.conftest import BUCKET, Make, client
from tests.object_store.lean import S3Handler, running
from tests.object_store.proxy import Proxy, Request, proxied
from tests.pipeline.forge import SLAB, writer_of

PART = 256 << 10
"""Less than S3 takes, and enough to see everything: how fast the machine is must not matter."""
STALLED = 4.0
"""Seconds until a request that stalls is given up, and so would be any other that takes as long."""


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "PART_BYTES", PART)


@pytest.fixture
async def proxy(endpoint: str) -> AsyncIterator[Proxy]:
    async with proxied(endpoint) as proxy:
        yield proxy


def shared(data: bytes) -> memoryview:
    """Memory as the arena's: writable, and no Python object's own."""
    view = memoryview(mmap.mmap(-1, len(data)))
    view[:] = data
    return view


async def upload(storage: ObjectStorage, data: memoryview, order: Callable[[list[int]], list[int]] = list) -> None:
    """By parts, all at once."""
    writer = await storage.create("a", len(data))
    try:
        with_offsets = order(list(range(0, len(data), PART)))
        async with asyncio.TaskGroup() as group:
            for offset in with_offsets:
                group.create_task(writer.write(offset, data[offset : offset + PART]))
        await writer.finish(len(data))
    except BaseException:
        await writer.abort()
        raise


def unfinished(endpoint: str, storage: ObjectStorage) -> list[str]:
    found = client(endpoint).list_multipart_uploads(Bucket=BUCKET, Prefix=storage.url.key(""))
    return [upload["Key"] for upload in found.get("Uploads", [])]


@pytest.mark.parametrize("order", [list, lambda offsets: offsets[::-1]], ids=["in order", "last first"])
async def test_parts_of_any_order_become_one_object(make: Make, order: Callable[[list[int]], list[int]]) -> None:
    storage, data = make(), shared(os.urandom(3 * PART + 12345))
    await upload(storage, data, order)
    await storage.barrier()
    assert await storage.get("a", len(data)) == data


async def test_a_write_returns_when_its_part_was_sent(make: Make, proxy: Proxy) -> None:
    """So whoever changes the buffer then changes nothing that is stored."""
    storage, first = make(via=proxy.url), os.urandom(PART)
    proxy.choose = lambda request: "stall" if request.is_part and not proxy.release.is_set() else ""
    writer = await storage.create("a", 2 * PART)
    buffer = shared(first)
    write = asyncio.create_task(writer.write(0, buffer))
    await proxy.stalled.wait()
    assert not write.done()
    proxy.release.set()  # the connection closes, and the part is sent again
    await write
    buffer[:] = bytes(PART)
    await writer.write(PART, buffer)
    await writer.finish(2 * PART)
    assert await storage.get("a", 2 * PART) == first + bytes(PART)


async def test_parts_that_meet_with_faults_are_sent_again(make: Make, proxy: Proxy) -> None:
    faults = ["500", "", "reset", "503", "after reset", "", "stall", "after 500"]
    storage, data = make(via=proxy.url, request=STALLED, retry=60.0), shared(os.urandom(4 * PART + 1))
    proxy.choose = lambda request: faults.pop(0) if request.is_part and faults else ""
    await upload(storage, data)
    await storage.barrier()
    assert not faults
    assert await storage.get("a", len(data)) == data


async def test_an_upload_whose_end_nobody_heard_of_is_removed(make: Make, proxy: Proxy) -> None:
    """The store completes it, and answers nothing from then on until it is aborted."""
    storage, data = make(via=proxy.url, retry=0.1), shared(os.urandom(PART + 1))
    lost: list[str] = []

    def choose(request: Request) -> str:
        if request.method == "POST" and "?uploadId=" in request.target and not lost:
            lost.append(request.target)
            return "after reset"
        return "reset" if lost else ""

    proxy.choose = choose
    writer = await storage.create("a", len(data))
    await writer.write(0, data[:PART])
    await writer.write(PART, data[PART:])
    with pytest.raises(StorageUnavailable):
        await writer.finish(len(data))
    proxy.choose = lambda request: ""
    assert await storage.list() == {"a": len(data)}
    await writer.abort()
    assert await storage.list() == {}


@pytest.mark.parametrize("call", ["?uploads", "?uploadId="])
@pytest.mark.parametrize("fault", ["truncate", "after reset", "after 500", "503", "reset"])
async def test_an_upload_whose_beginning_or_end_meets_with_a_fault(
    make: Make, proxy: Proxy, call: str, fault: str
) -> None:
    storage, data = make(via=proxy.url), shared(os.urandom(PART + 1))
    faults = [fault]
    proxy.choose = lambda request: (
        faults.pop() if request.method == "POST" and call in request.target and faults else ""
    )
    await upload(storage, data)
    await storage.barrier()
    assert not faults
    assert await storage.get("a", len(data)) == data


async def test_an_upload_that_fails_leaves_nothing(make: Make, proxy: Proxy, endpoint: str) -> None:
    storage = make(via=proxy.url, retry=0.3)
    proxy.choose = lambda request: "500" if request.is_part and "partNumber=2" in request.target else ""
    with pytest.raises(StorageError, match="500 InternalError"), ungrouped():
        await upload(storage, shared(bytes(3 * PART)))
    assert await storage.list() == {}
    assert unfinished(endpoint, storage) == []


class _Damaging(S3Handler):
    """Of the second part of an upload a bit arrives otherwise than it was sent. As S3 it looks at the digests."""

    def answer_request(self, body: memoryview) -> None:
        if self.query.get("partNumber") == "2":
            body[1000] ^= 1
        if self.command == "PUT" and hashlib.sha256(body).hexdigest() != self.headers["x-amz-content-sha256"]:
            return self.refuse(400, "XAmzContentSHA256Mismatch")
        return super().answer_request(body)


async def test_a_part_that_arrives_damaged_is_refused_by_the_store(make: Make) -> None:
    with running(_Damaging) as (endpoint, memory):
        storage = make(via=endpoint)
        with pytest.raises(StorageError, match="400 XAmzContentSHA256Mismatch"), ungrouped():
            await upload(storage, shared(bytes(3 * PART)))
        assert not memory.objects and not memory.begun


async def test_a_cancelled_upload_gives_its_buffers_back_and_leaves_nothing(
    make: Make, proxy: Proxy, endpoint: str
) -> None:
    storage = make(via=proxy.url)
    proxy.choose = lambda request: "stall" if request.is_part else ""
    memory = mmap.mmap(-1, 2 * PART)
    view = memoryview(memory)
    with anyio.CancelScope() as scope:
        async with asyncio.TaskGroup() as group:
            group.create_task(upload(storage, view))
            await proxy.stalled.wait()
            scope.cancel()
    view.release()
    memory.close()  # BufferError, if anybody had it still
    assert await storage.list() == {}
    assert unfinished(endpoint, storage) == []


async def test_what_comes_too_early_is_held_up_to_a_bound(make: Make) -> None:
    storage, data = make(), shared(bytes(PART))
    writer = await storage.create("a", 100 * PART)
    for number in range(1, PARTS_AHEAD + 1):
        await writer.write(number * PART, data)
    await writer.write(PART, data[:0])  # nothing more of what is held already
    with pytest.raises(StorageError, match="were written before part 0 was whole; write it in order"):
        await writer.write((PARTS_AHEAD + 1) * PART, data)
    await writer.abort()
    assert await storage.list() == {}


async def test_a_save_sends_parts_in_order(make: Make, proxy: Proxy) -> None:
    """However its slabs come; so none of it is held in memory but the slabs."""
    storage = make(via=proxy.url)
    writer, slabs = writer_of(storage, {"w": np.arange(40 * SLAB // 8)})
    ready = list(slabs.ready)
    slabs.ready = deque(ready[6::-1] + ready[7:])
    copied, fill = list[int](), writing.ObjectStoreWriter._fill

    def counted(target: writing.ObjectStoreWriter, number: int, start: int, piece: memoryview) -> None:
        copied.append(number)
        fill(target, number, start, piece)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "PART_BYTES", SLAB)
        patch.setattr(writing.ObjectStoreWriter, "_fill", counted)
        await writer.run()
    assert copied == [len(ready) - 1], "only the last part, which is no whole one, is copied"
    assert sorted(slabs.given_back) == list(range(len(ready)))


@pytest.mark.parametrize("piece", [PART, PART // 2], ids=["lent", "copied"])
async def test_so_many_parts_are_under_way_and_no_more(make: Make, proxy: Proxy, endpoint: str, piece: int) -> None:
    """Whoever writes more waits: by whole parts, each from a task of its own, and by halves, one after another."""
    storage = make(via=proxy.url)
    proxy.choose = lambda request: "stall" if request.is_part else ""
    proxy.stalls_wanted = PARTS_IN_FLIGHT + 1
    writer = await storage.create("a", 30 * PART)
    data, written = shared(bytes(piece)), 0

    async def write(*numbers: int) -> None:
        nonlocal written
        for number in numbers:
            await writer.write(number * piece, data)
            written += piece

    with anyio.fail_after(40):
        async with anyio.create_task_group() as tasks:
            if piece == PART:
                for number in range(PARTS_IN_FLIGHT + 1):
                    tasks.start_soon(write, number)
            else:
                tasks.start_soon(write, *range(60))
            await proxy.stalled.wait()
            tasks.cancel_scope.cancel()
    assert written <= (PARTS_IN_FLIGHT + 1) * PART
    await writer.abort()
    assert writer.parts_lent == 0 and unfinished(endpoint, storage) == []


async def test_many_parts_that_were_held_are_given_up_at_once(make: Make, proxy: Proxy, endpoint: str) -> None:
    """However many there are: obstore takes no more than are under way, and hears of it though all of these stall."""
    storage = make(via=proxy.url)
    proxy.choose = lambda request: "stall" if request.is_part else ""
    proxy.stalls_wanted = PARTS_IN_FLIGHT + 1
    writer, data = await storage.create("a", 30 * PART), shared(bytes(PART))
    for number in range(1, 25):
        await writer.write(number * PART, data)
    first = asyncio.create_task(writer.write(0, data))
    await proxy.stalled.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await writer.abort()
    assert writer.parts_lent == 0 and unfinished(endpoint, storage) == []


async def test_an_object_that_is_not_what_was_sent_is_found_before_the_commit(make: Make, endpoint: str) -> None:
    for data in (b"shorter", os.urandom(2 * PART + 1)):
        storage = make()
        await upload(storage, shared(os.urandom(2 * PART + 1)))
        await storage.put("b", b"index")
        client(endpoint).put_object(Bucket=BUCKET, Key=storage.url.key("a"), Body=data)
        for _ in range(2):
            with pytest.raises(StorageError, match=r"/a (has 7 bytes|is not what was stored)"):
                await storage.barrier()
    storage = make()
    await storage.put("b", b"index")
    client(endpoint).delete_object(Bucket=BUCKET, Key=storage.url.key("b"))
    with pytest.raises(StorageError, match="is not there"):
        await storage.barrier()


@pytest.mark.parametrize("fault", ["500", "503", "reset", "truncate", "stall"])
async def test_a_read_that_breaks_off_is_resumed(make: Make, proxy: Proxy, fault: str) -> None:
    storage, data = make(via=proxy.url, request=STALLED if fault == "stall" else 30.0), os.urandom(1 << 20)
    await storage.put("a", data)
    reader = await storage.open("a")
    faults = [fault]
    proxy.choose = lambda request: faults.pop() if request.method == "GET" and faults else ""
    into = memoryview(bytearray(500_000))
    assert await reader.read(1000, [into]) == 500_000
    assert into == data[1000:501_000] and not faults
    ranges = [request.headers["range"] for request in proxy.seen if request.method == "GET"]
    assert ranges[0] == "bytes=1000-500999"
    resumed = int(ranges[-1].removeprefix("bytes=").split("-")[0])
    assert resumed > 1000 if fault == "truncate" else resumed == 1000


async def test_an_object_that_changed_while_it_was_open_is_not_mixed(make: Make, endpoint: str) -> None:
    storage = make()
    await storage.put("a", b"first")
    reader = await storage.open("a")
    client(endpoint).put_object(Bucket=BUCKET, Key=storage.url.key("a"), Body=b"other")
    with pytest.raises(StorageError, match="another object"):
        await reader.read(0, [memoryview(bytearray(5))])


async def test_what_a_dead_process_left_is_found_and_removed(make: Make, endpoint: str) -> None:
    storage = make()
    key = storage.url.key("data.safetensors")
    client(endpoint).create_multipart_upload(Bucket=BUCKET, Key=key)
    [(name, of)] = (await storage.temporaries()).items()
    assert name.startswith(".data.safetensors.") and of == "data.safetensors"
    await storage.delete([name, f".gone.{'0' * 16}"])
    assert await storage.temporaries() == {} and unfinished(endpoint, storage) == []
