"""What is promised of an object's life, from ``create`` to ``finish`` or ``abort``, to ``open`` and ``aclose``."""

from __future__ import annotations

import asyncio
from typing import Final

import anyio

from asyncdcp.errors import Closed, InvalidOption, StorageError
from asyncdcp.storage import Storage
from asyncdcp.testing.storage.kit import Check, StorageKit, opened, page_buffer, raises, write


async def a_closed_reader_and_writer_refuse(kit: StorageKit) -> None:
    storage = kit.make()
    _, reader = await opened(storage, 3)
    await reader.aclose()
    await reader.aclose()
    for read in (reader.read, reader.read_cached):
        with raises(Closed):
            await read(0, [page_buffer(b"x")])
    writer = await storage.create("b", 0)
    await writer.finish(0)
    with raises(Closed):
        await writer.write(0, page_buffer(bytes(writer.alignment)))
    with raises(Closed):
        await writer.finish(0)


async def negative_numbers_are_refused(kit: StorageKit) -> None:
    storage = kit.make()
    writer = await storage.create("a", 0)
    with raises(InvalidOption):
        await writer.write(-writer.alignment, page_buffer(bytes(writer.alignment)))
    with raises(InvalidOption):
        await writer.finish(-1)
    await writer.finish(0)
    reader = await storage.open("a")
    with raises(InvalidOption):
        await reader.read(-1, [page_buffer(b"x")])
    await reader.aclose()


async def abort_leaves_nothing_and_frees_the_name(kit: StorageKit) -> None:
    storage = kit.make()
    writer = await storage.create("a", 10_000)
    await writer.write(0, page_buffer(bytes(writer.alignment)))
    await writer.abort()
    await writer.abort()
    assert await storage.list() == {} and await storage.temporaries() == {}
    await storage.put("a", b"new")
    await writer.abort()
    assert await storage.get("a", 3) == b"new"


async def abort_after_finish_does_nothing(kit: StorageKit) -> None:
    storage = kit.make()
    writer = await storage.create("a", 0)
    await writer.finish(0)
    await writer.abort()
    assert await storage.list() == {"a": 0}


async def abort_takes_nothing_of_anothers(kit: StorageKit) -> None:
    """Whether a name is another's shows at ``create``, or else at ``finish``."""
    storage = kit.make()
    writer = await storage.create("a", 0)
    await writer.write(0, page_buffer(b"o" * writer.alignment))
    try:
        await kit.again(storage).put("a", b"theirs")
    except FileExistsError:
        return await writer.abort()
    with raises(StorageError):
        await writer.finish(4)
    await writer.abort()
    assert await storage.get("a", 6) == b"theirs"


async def what_is_being_finished_takes_no_more(kit: StorageKit) -> None:
    writer = await kit.make().create("a", 0)
    finishing = asyncio.create_task(writer.finish(0))
    await asyncio.sleep(0)
    with raises(Closed):
        await writer.write(0, page_buffer(bytes(writer.alignment)))
    with raises(Closed):
        await writer.finish(0)
    await finishing


async def finish_refuses_after_a_cancelled_write(kit: StorageKit) -> None:
    storage = kit.make()
    writer = await storage.create("a", 0)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await writer.write(0, page_buffer(bytes(writer.alignment)))
    with raises(StorageError, "failed"):
        await writer.finish(writer.alignment)
    await writer.abort()
    assert await storage.list() == {}


async def cancelled_methods_leave_nothing(kit: StorageKit) -> None:
    """By an anyio scope or by ``Task.cancel``, at any time: what was begun has come to rest, whole or not at all."""
    data = bytes(1 << 20)
    for turns in range(24):
        storage = kit.make()
        if turns % 2:
            with anyio.CancelScope() as scope:
                asyncio.get_running_loop().call_later(turns / 5000, scope.cancel)
                await _write_or_abort(storage, data)
        else:
            task = asyncio.create_task(_write_or_abort(storage, data))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        if "a" in await storage.list():
            assert await storage.get("a", len(data)) == data
        assert await storage.temporaries() == {}
        await storage.delete(["a"])
        await storage.put("a", b"the name is free")


async def _write_or_abort(storage: Storage, data: bytes) -> None:
    writer = await storage.create("a", len(data))
    try:
        await write(writer, data)
    except BaseException:
        await writer.abort()
        raise


CHECKS: Final[tuple[Check, ...]] = (
    a_closed_reader_and_writer_refuse,
    negative_numbers_are_refused,
    abort_leaves_nothing_and_frees_the_name,
    abort_after_finish_does_nothing,
    abort_takes_nothing_of_anothers,
    what_is_being_finished_takes_no_more,
    finish_refuses_after_a_cancelled_write,
    cancelled_methods_leave_nothing,
)
