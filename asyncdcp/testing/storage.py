"""What the Storage port promises, as checks that any implementation can be put to.

    kit = StorageKit(lambda: MyStorage(new_place()), lambda storage: MyStorage(storage.place))

    @pytest.mark.parametrize("check", STORAGE_CHECKS, ids=lambda check: check.__name__)
    async def test_conformance(check):
        await check(kit)

Each check makes what it needs, raises ``AssertionError`` where a promise is broken, and may be run on any asyncio loop.
What no call can show (that what is durable survives a loss of power) is not among them: see ``testing.disk``.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

import anyio

from asyncdcp.errors import Closed, CorruptCheckpoint, InvalidOption, StorageError
from asyncdcp.storage import Fetch, ObjectReader, ObjectWriter, Storage, open_spec, spec_of

_KIB: Final = 1024
_BAD_NAMES: Final = ("", ".", "..", ".a", "a/b", "/a", "a b", "ä", "a\0", "a\n", "a" * 201, "/etc/passwd")


@dataclass(frozen=True)
class StorageKit:
    """How the checks come by storages. ``make`` gives one of a new, empty place each time.

    ``again`` gives another instance of the same place, as another process would have it; by default the same one, for
    storages that have only one.
    """

    make: Callable[[], Storage]
    again: Callable[[Storage], Storage] = lambda storage: storage


Check: TypeAlias = Callable[[StorageKit], Awaitable[None]]


def page_buffer(data: bytes) -> memoryview:
    """A writable buffer on a page boundary that holds ``data``."""
    view = memoryview(mmap.mmap(-1, max(1, len(data))))
    view[: len(data)] = data
    return view[: len(data)]


@contextmanager
def _raises(kind: type[BaseException], match: str = "") -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert match in str(error), f"{match!r} is not in {error!r}"
    else:
        raise AssertionError(f"{kind.__name__} was not raised")


async def _write(writer: ObjectWriter, data: bytes, step: int = 64 * _KIB) -> None:
    """Writes all pieces at once, the last one padded, last first."""
    alignment = writer.alignment
    async with asyncio.TaskGroup() as group:
        for offset in reversed(range(0, len(data), step)):
            piece = data[offset : offset + step]
            padded = piece.ljust(-(-len(piece) // alignment) * alignment, b"#")
            group.create_task(writer.write(offset, page_buffer(padded)))
    await writer.finish(len(data))


async def _stored(storage: Storage, name: str, data: bytes, hint: int = 0) -> None:
    await _write(await storage.create(name, hint), data)


async def _opened(storage: Storage, length: int) -> tuple[bytes, ObjectReader]:
    data = os.urandom(length)
    await _stored(storage, "a", data)
    return data, await storage.open("a")


# ── bytes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def bytes_come_back(kit: StorageKit) -> None:
    """Of any length, with any hint, here and in another instance."""
    for length in (0, 1, 4096, 64 * _KIB + 1, 300_001):
        for hint in (0, 1000, 1_000_000):
            storage, data = kit.make(), os.urandom(length)
            await _stored(storage, "a.bin", data, hint)
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
    data, reader = await _opened(kit.make(), 300_001)
    assert reader.size == len(data)
    for offset in (0, 4096, 5, 299_000):
        buffers = [memoryview(bytearray(n)) for n in (0, 7, 500)] + [page_buffer(bytes(60))]
        assert await reader.read(offset, buffers) == 567
        assert b"".join(buffers) == data[offset : offset + 567]
        assert await reader.read(offset, []) == 0
    await reader.aclose()


async def an_aligned_read_reaches_past_the_end(kit: StorageKit) -> None:
    data, reader = await _opened(kit.make(), 100_001)
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
    data, reader = await _opened(kit.make(), 5000)
    buffers = [memoryview(bytearray(1)) for _ in range(5000)]
    assert await reader.read(0, buffers) == 5000
    assert b"".join(buffers) == data
    assert not await reader.read_cached(0, buffers) or b"".join(buffers) == data
    await reader.aclose()


async def fetch_reads_one_way_or_the_other(kit: StorageKit) -> None:
    """Several reads after one another, each with what it calls, whose errors it hands on."""
    data, reader = await _opened(kit.make(), 50_000)
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
    with _raises(LookupError, "the caller's"):
        await reader.fetch(Fetch(0, [cached], [otherwise], fail), Fetch(0, [cached], [otherwise], then))
    assert len(taken) == 3
    await reader.aclose()
    with _raises(Closed):
        await reader.fetch(Fetch(0, [cached], [otherwise], then))


async def get_keeps_its_limit(kit: StorageKit) -> None:
    storage = kit.make()
    await storage.put("a", b"12345")
    assert await storage.get("a", 5) == b"12345"
    with _raises(CorruptCheckpoint, "5 bytes"):
        await storage.get("a", 4)


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def what_exists_is_not_made_again(kit: StorageKit) -> None:
    """By whom and how ever it was made; the errors are plain ``FileExistsError``."""
    storage = kit.make()
    await storage.put("a", b"first")
    for other in (storage, kit.again(storage)):
        for call in (partial(other.put, "a", b"second"), partial(other.create, "a", 10)):
            try:
                await call()
            except FileExistsError as error:
                assert not isinstance(error, StorageError)
            else:
                raise AssertionError("what exists was made again")
        assert await other.claim("a", b"third") is False
        assert await other.get("a", 5) == b"first"
        assert await other.list() == {"a": 5}


async def what_is_missing(kit: StorageKit) -> None:
    storage = kit.make()
    assert await storage.list() == {}
    await storage.barrier()
    await storage.delete(["a", "b"])
    for call in (partial(storage.get, "a", 1), partial(storage.open, "a")):
        with _raises(FileNotFoundError):
            await call()


async def delete_passes_over_what_is_gone(kit: StorageKit) -> None:
    storage = kit.make()
    await storage.put("a", b"1")
    await storage.put("b", b"2")
    await storage.delete(["x", "a", "y"])
    await storage.barrier()
    assert await storage.list() == await kit.again(storage).list() == {"b": 1}
    assert await storage.claim("a", b"3") is True


async def of_many_claims_one_wins(kit: StorageKit) -> None:
    storage = kit.make()
    claimers = [kit.again(storage) for _ in range(20)]
    async with asyncio.TaskGroup() as group:
        claims = [group.create_task(claimer.claim("r", b"%d" % n)) for n, claimer in enumerate(claimers)]
    winners = [n for n, claim in enumerate(claims) if claim.result()]
    assert len(winners) == 1, f"{len(winners)} of 20 claims were won"
    assert await storage.get("r", 10) == b"%d" % winners[0]
    assert await storage.temporaries() == {}


async def bad_names_are_refused(kit: StorageKit) -> None:
    storage = kit.make()
    for name in _BAD_NAMES:
        calls: tuple[Callable[[], Awaitable[object]], ...] = (
            *(partial(storage.create, name, 0), partial(storage.put, name, b""), partial(storage.claim, name, b"")),
            *(partial(storage.get, name, 1), partial(storage.open, name), partial(storage.delete, ["fine", name])),
        )
        for call in calls:
            with _raises(InvalidOption, "name"):
                await call()
    assert await storage.list() == {}


async def the_longest_name_is_served(kit: StorageKit) -> None:
    storage = kit.make()
    assert await storage.claim("a" * 200, b"x")
    await storage.put("b" * 200, b"y")
    assert await storage.get("a" * 200, 1) == b"x"


async def nothing_is_left_of_what_ended(kit: StorageKit) -> None:
    """No temporaries of puts and claims, won or lost."""
    storage = kit.make()
    await storage.put("a", b"1")
    assert await storage.claim("b", b"2")
    assert not await storage.claim("b", b"3")
    assert await storage.temporaries() == {}
    assert await storage.list() == {"a": 1, "b": 1}


# ── an object's life ────────────────────────────────────────────────────────────────────────────────────────────────


async def a_closed_reader_and_writer_refuse(kit: StorageKit) -> None:
    storage = kit.make()
    _, reader = await _opened(storage, 3)
    await reader.aclose()
    await reader.aclose()
    for read in (reader.read, reader.read_cached):
        with _raises(Closed):
            await read(0, [page_buffer(b"x")])
    writer = await storage.create("b", 0)
    await writer.finish(0)
    with _raises(Closed):
        await writer.write(0, page_buffer(bytes(writer.alignment)))
    with _raises(Closed):
        await writer.finish(0)


async def negative_numbers_are_refused(kit: StorageKit) -> None:
    storage = kit.make()
    writer = await storage.create("a", 0)
    with _raises(InvalidOption):
        await writer.write(-writer.alignment, page_buffer(bytes(writer.alignment)))
    with _raises(InvalidOption):
        await writer.finish(-1)
    await writer.finish(0)
    reader = await storage.open("a")
    with _raises(InvalidOption):
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


async def finish_refuses_after_a_cancelled_write(kit: StorageKit) -> None:
    storage = kit.make()
    writer = await storage.create("a", 0)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await writer.write(0, page_buffer(bytes(writer.alignment)))
    with _raises(StorageError, "failed"):
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
        await _write(writer, data)
    except BaseException:
        await writer.abort()
        raise


# ── the storage itself ──────────────────────────────────────────────────────────────────────────────────────────────


async def it_says_what_it_is(kit: StorageKit) -> None:
    storage = kit.make()
    info = storage.info
    assert info.location and info.filesystem
    assert kit.again(storage).info == info


async def it_travels(kit: StorageKit) -> None:
    """A spec, if it has one, opens the same place in another process."""
    storage = kit.make()
    await storage.put("a", b"1")
    spec = spec_of(storage)
    if spec is not None:
        assert await open_spec(spec).get("a", 1) == b"1"


STORAGE_CHECKS: Final[tuple[Check, ...]] = (
    bytes_come_back,
    ranges_never_written_are_zeros,
    reads_of_any_alignment,
    an_aligned_read_reaches_past_the_end,
    many_small_buffers_in_one_read,
    fetch_reads_one_way_or_the_other,
    get_keeps_its_limit,
    what_exists_is_not_made_again,
    what_is_missing,
    delete_passes_over_what_is_gone,
    of_many_claims_one_wins,
    bad_names_are_refused,
    the_longest_name_is_served,
    nothing_is_left_of_what_ended,
    a_closed_reader_and_writer_refuse,
    negative_numbers_are_refused,
    abort_leaves_nothing_and_frees_the_name,
    abort_after_finish_does_nothing,
    finish_refuses_after_a_cancelled_write,
    cancelled_methods_leave_nothing,
    it_says_what_it_is,
    it_travels,
)
"""Every check; a name says what is promised."""
