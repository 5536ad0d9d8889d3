"""Ranges of data files, read through the cache or past it, overlapping, tiny, huge and at the end."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import pytest
from anyio import CapacityLimiter
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from asyncdcp.errors import ChecksumMismatch, CorruptCheckpoint, StorageError
from asyncdcp.names import data_name, index_name, record_name
from asyncdcp.pipeline import reader as reading
from asyncdcp.pipeline import windows as cutting
from asyncdcp.pipeline.reader import CheckpointReader
from asyncdcp.pipeline.union import FileMap
from asyncdcp.pipeline.windows import ReadRange
from asyncdcp.runs.history import stage_times
from asyncdcp.storage import Fetch, LocalStorage, MemoryStorage, ObjectReader
from asyncdcp.threads import on_thread
from asyncdcp.trace import Trace
from tests.pipeline.forge import BLOCK, OTHER, SAVE, forger, read_all, save, steady
from tests.pipeline.staged import is_waited_for

T = TypeVar("T")

ARRAYS = {"w": np.random.default_rng(0).integers(0, 256, 300_001, np.uint8), "b": np.arange(9, dtype=np.int16)}
FILE = data_name(SAVE, 0, 0)


class Seen(MemoryStorage):
    """Counts what is open. ``cached`` says whether each read finds all in the cache, False leaving rubbish behind."""

    def __init__(self) -> None:
        super().__init__()
        self.open_now: list[str] = []
        self.most = 0
        self.cached: Callable[[], bool] = lambda: True
        self.error: Exception | None = None
        self.close_error = False
        self.cut = 0

    async def open(self, name: str) -> Any:
        reader = await super().open(name)
        self.open_now.append(name)
        self.most = max(self.most, len(self.open_now))
        return _Seen(name, reader, self)


class _Seen:
    def __init__(self, name: str, inner: ObjectReader, storage: Seen) -> None:
        self._name = name
        self._inner = inner
        self._storage = storage
        self.size = inner.size - storage.cut
        self.alignment = 4096

    async def read(self, offset: int, buffers: Sequence[memoryview]) -> int:
        assert len(buffers) == 1 and len(buffers[0]) % 4096 == offset % 4096 == 0
        if self._storage.error is not None:
            raise self._storage.error
        return await self._inner.read(offset, buffers)

    async def read_cached(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        await self._inner.read(offset, buffers)
        if self._storage.cached():
            return True
        for buffer in buffers:
            buffer[: len(buffer) // 2] = bytes(len(buffer) // 2)
        return False

    async def fetch(self, *reads: Fetch) -> None:
        for read in reads:
            found = await self.read_cached(read.offset, read.cached)
            if found and read.seen is not None:
                for there in range(0, sum(map(len, read.cached)), 3000):  # in steps that are no blocks
                    read.seen(there)
            if not found:
                await self.read(read.offset, read.otherwise)
            await on_thread(CapacityLimiter(1), read.then, found)

    async def aclose(self) -> None:
        self._storage.open_now.remove(self._name)
        if self._storage.close_error:
            raise StorageError("what was only read can lose nothing by it")


@pytest.fixture(params=["cached", "uncached", "mixed", "straight"])
async def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Seen]:
    """Windows of four blocks; ``straight`` reads even short parts right into their targets."""
    for module in (reading, cutting):
        monkeypatch.setattr(module, "SLAB_BYTES", 16384)
    monkeypatch.setattr(cutting, "STRAIGHT_BYTES", 1 if request.param == "straight" else 5000)
    storage, rng = Seen(), random.Random(1)
    storage.close_error = True
    await save(storage, ARRAYS)
    storage.cached = {
        "cached": lambda: True,
        "straight": lambda: True,
        "uncached": lambda: False,
        "mixed": lambda: rng.random() < 0.5,
    }[request.param]
    yield storage
    assert not storage.open_now


async def check(storage: Seen, bounds: Sequence[tuple[int, int]]) -> None:
    """Reads all ranges at once, each into memory and by delivery, and compares them with the file."""
    data = storage._objects[FILE]
    ranges, buffers = [], []
    for begin, end in bounds:
        into, pieces = bytearray(end - begin), bytearray(end - begin)

        def deliver(offset: int, part: memoryview, pieces: bytearray = pieces) -> None:
            assert not any(pieces[offset : offset + len(part)]) or 0 in data
            pieces[offset : offset + len(part)] = part

        ranges += [ReadRange(FILE, begin, end, memoryview(into), None), ReadRange(FILE, begin, end, None, deliver)]
        buffers += [into, pieces]
    async with await CheckpointReader.open(storage) as reader:
        await reader.read(ranges, Trace())
        for part, buffer in zip(ranges, buffers, strict=True):
            assert buffer == data[part.begin : part.end]


async def test_ranges_of_all_kinds(storage: Seen) -> None:
    size = len(storage._objects[FILE])
    await check(storage, [(0, size)])
    await check(storage, [(0, size), (0, size), (20_000, 30_000)])  # one after all windows of another were begun
    await check(storage, [(4096, 4097), (8191, 8193), (size - 1, size), (size - 5000, size)])
    await check(storage, [(0, 16384), (16384, 32768), (40_000, 40_000)])
    await check(storage, [(5000, 100_000), (5000, 5001), (99_999, 200_000), (16_000, 17_000)])
    await check(storage, [])


async def test_random_ranges(storage: Seen) -> None:
    size, rng = len(storage._objects[FILE]), random.Random(7)
    for _ in range(15):
        begins = [rng.randrange(size) for _ in range(rng.randrange(1, 9))]
        await check(storage, [(begin, min(size, begin + rng.choice((1, 100, 6000, 70_000)))) for begin in begins])


async def test_what_nothing_wants_is_not_read(storage: Seen) -> None:
    trace = Trace()
    async with await CheckpointReader.open(storage) as reader:
        ranges = [ReadRange(FILE, n, n + 10, memoryview(bytearray(10)), None) for n in (5000, 60_000, 60_010)]
        await reader.read(ranges, trace)
    assert {stage: time.bytes for stage, time in stage_times(trace.spans).items()} == {"read": 8192, "verify": 30}


async def test_a_bad_block_is_never_delivered(storage: Seen) -> None:
    data = bytearray(storage._objects[FILE])
    data[50_000] ^= 1
    storage._objects[FILE] = bytes(data)
    delivered: list[int] = []
    part = ReadRange(FILE, 49_152, 53_248, None, lambda offset, _: delivered.append(offset))
    async with await CheckpointReader.open(storage) as reader:
        with pytest.raises(ChecksumMismatch, match=r"block 12 .* it holds w") as caught:
            await reader.read([part], Trace())
        assert caught.value.block == 12 and not delivered and not storage.open_now
        await reader.read([replace(part, begin=45_056, end=49_152)], Trace())
    assert delivered == [0]


async def test_a_file_that_was_cut_after_it_was_checked() -> None:
    storage = Seen()
    await save(storage, ARRAYS)
    storage.cut = 1
    with pytest.raises(CorruptCheckpoint, match=FILE) as caught:
        await read_all(storage)
    assert "w" in caught.value.tensors
    storage.cut, storage.error, storage.cached = 0, EOFError("cut"), lambda: False
    with pytest.raises(CorruptCheckpoint, match=f"{FILE} has become shorter"):
        await read_all(storage)
    assert not storage.open_now


async def test_a_file_that_was_deleted_after_it_was_checked() -> None:
    storage = Seen()
    await save(storage, ARRAYS)
    async with await CheckpointReader.open(storage) as reader:
        del storage._objects[FILE]
        with pytest.raises(CorruptCheckpoint, match=f"{FILE} is missing"):
            await reader.read([ReadRange(FILE, 0, 1, memoryview(bytearray(1)), None)], Trace())


async def test_errors_of_the_storage_come_through() -> None:
    storage = Seen()
    await save(storage, ARRAYS)
    storage.cached, storage.error = lambda: False, StorageError("EIO")
    with pytest.raises(StorageError, match="EIO"):
        await read_all(storage)
    assert not storage.open_now


async def test_few_files_are_open_at_once() -> None:
    storage = Seen()
    arrays = {f"t{n}": np.full(3000, n, np.int16) for n in range(40)}
    await save(storage, arrays, file_limit=6000)
    loaded = await read_all(storage)
    assert all(np.array_equal(loaded[name], arrays[name]) for name in arrays)
    assert 1 <= storage.most <= reading.READS_IN_FLIGHT and not storage.open_now


@pytest.mark.parametrize("direct_io", [True, False])
async def test_files_on_a_disk(tmp_path: Any, direct_io: bool) -> None:
    rng = np.random.default_rng(1)
    arrays: dict[str, Any] = {
        "big": rng.integers(0, 99, 1_500_000),
        "f": np.ones((3, 0), np.float16),
        "s": np.array(2.0),
    }
    memory, disk = MemoryStorage(), LocalStorage(tmp_path, direct_io=direct_io)
    await save(memory, arrays)
    for name, data in memory._objects.items():
        await disk.put(name, data)
    loaded = await read_all(disk)
    assert all(np.array_equal(loaded[name], arrays[name]) for name in arrays)


async def test_delivered_tensors_are_the_same() -> None:
    forged = await forger()
    direct, delivered = await read_all(forged.storage), await read_all(forged.storage, direct=False)
    assert all(np.array_equal(direct[name], delivered[name]) for name in direct)


async def test_a_checkpoint_replaced_while_it_is_opened() -> None:
    """What is found then is the new one."""

    class Overwritten(MemoryStorage):
        new: MemoryStorage

        async def get(self, name: str, limit: int) -> bytes:
            if name == index_name(SAVE, 0):
                self._objects = self.new._objects
            return await super().get(name, limit)

    storage = Overwritten()
    await save(storage, ARRAYS)
    storage.new = MemoryStorage()
    storage.new._objects = dict(storage._objects)
    await save(storage.new, {"new": np.zeros(3)}, save_id=OTHER, overwrite=True)
    assert record_name(SAVE) not in storage.new._objects
    assert (await read_all(storage)).keys() == {"new"}


async def test_a_cancelled_task_waits_for_the_thread_that_fills_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = (await forger()).storage
    assert await is_waited_for("asyncdcp.pipeline.reader.place_window", read_all(storage), monkeypatch)


@given(
    st.lists(st.tuples(st.integers(0, 40 * BLOCK), st.integers(1, 3 * BLOCK)), min_size=1, max_size=12),
    st.integers(0, 12 * BLOCK),
)
@steady
def test_what_lies_close_together_is_read_at_once_and_little_else(wanted: list[tuple[int, int]], gap: int) -> None:
    """Every byte wanted is in one window; of what a window reads, at most half is unwanted, and no more than ``gap``
    in a row.
    """
    size = 44 * BLOCK
    file = FileMap(FILE, size, BLOCK, None, [], [])
    ranges = [ReadRange(FILE, begin, min(begin + length, size), None, None) for begin, length in wanted]
    windows = cutting.cut_windows(ranges, {FILE: file}, gap)
    blocks = {block for part in ranges for block in range(part.begin // BLOCK, -(-part.end // BLOCK))}
    covered = [block for window in windows for block in range(window.begin // BLOCK, -(-window.end // BLOCK))]
    assert len(covered) == len(set(covered)) and blocks <= set(covered)
    for window in windows:
        here = range(window.begin // BLOCK, -(-window.end // BLOCK))
        unwanted = [block not in blocks for block in here]
        longest = max((len(list(run)) for missing, run in groupby(unwanted) if missing), default=0)
        assert 2 * sum(unwanted) <= len(here) and longest * BLOCK <= gap


def test_what_is_worth_a_request_of_its_own() -> None:
    file = FileMap(FILE, 44 * BLOCK, BLOCK, None, [], [])

    def windows(gap: int, *blocks: int) -> list[tuple[int, int]]:
        ranges = [ReadRange(FILE, block * BLOCK + 7, block * BLOCK + 9, None, None) for block in blocks]
        found = cutting.cut_windows(ranges, {FILE: file}, gap)
        return [(window.begin // BLOCK, window.end // BLOCK) for window in found]

    assert windows(0, 0, 2, 3) == [(0, 1), (2, 4)]
    assert windows(BLOCK, 0, 2, 3) == [(0, 4)]
    assert windows(BLOCK, 0, 1, 2, 5) == [(0, 3), (5, 6)]  # too far apart
    assert windows(9 * BLOCK, 0, 9) == [(0, 1), (9, 10)]  # near enough, and most of it in vain
