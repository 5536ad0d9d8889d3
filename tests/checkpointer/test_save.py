"""What save() promises: at once, in order, off the trainer's loop; when tensors are free; its futures and results."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
import uvloop

from asyncdcp import AsyncCheckpointer, MemoryStorage, Options, SaveHandle, SyncCheckpointer
from asyncdcp.checkpointer.lanes import Lanes
from asyncdcp.errors import (
    CheckpointExists,
    CheckpointNotFound,
)
from asyncdcp.staging.copier import SlabCopier
from tests.checkpointer.conftest import LONG, Opened, save_ids

MIB = 1 << 20


def lanes(checkpointer: AsyncCheckpointer) -> Lanes:
    return checkpointer._lanes


# ── off the trainer's loop ──


async def test_a_save_goes_on_while_the_trainers_loop_is_blocked(
    checkpointer: AsyncCheckpointer, tmp_path: Path
) -> None:
    state = {"w": torch.randn(2 * MIB)}
    checkpointer.prepare(state).result()
    handle = checkpointer.save(tmp_path / "it", state)
    assert handle.committed.wait(LONG)  # a trainer that blocks its own loop is the point
    assert (await handle).tensor_bytes == 8 * MIB


async def test_a_save_goes_on_beside_a_loop_that_is_busy_with_python(
    checkpointer: AsyncCheckpointer, tmp_path: Path
) -> None:
    handle = checkpointer.save(tmp_path / "it", {"w": torch.randn(MIB)})
    until, count = time.monotonic() + LONG, 0
    while not handle.done() and time.monotonic() < until:
        count += 1
    assert handle.done()
    assert (await handle).tensor_bytes == 4 * MIB


# ── when tensors are free, and order ──


def test_tensors_may_be_changed_once_staged(checkpointer: AsyncCheckpointer, faulty: Any) -> None:
    storage = faulty()
    gate = storage.gate("write")
    state = {"small": torch.zeros(10), "big": torch.zeros(4 * MIB)}
    handle = checkpointer.save(storage, state)
    handle.staged.result()
    gate.wait_begun()
    for tensor in state.values():
        tensor.fill_(1)
    state["new"] = torch.zeros(1)
    gate.release.set()
    handle.result()
    loaded = checkpointer.load(storage).result()
    assert list(loaded) == ["small", "big"]
    assert not any(tensor.any() for tensor in loaded.values())


def test_values_are_taken_at_the_call(checkpointer: AsyncCheckpointer, faulty: Any) -> None:
    storage = faulty()
    gate = storage.gate("list")
    state: dict[str, Any] = {"losses": [1.0], "epoch": 1, "w": torch.ones(1)}
    handle = checkpointer.save(storage, state)
    gate.wait_begun()
    state["losses"].append(2.0)
    state["epoch"] = 2
    storage.open_all()
    handle.result()
    loaded = checkpointer.load(storage).result()
    assert (loaded["losses"], loaded["epoch"]) == ([1.0], 1)


def test_saves_are_committed_in_the_order_of_the_calls(checkpointer: AsyncCheckpointer, faulty: Any) -> None:
    settled: list[int] = []
    storages = [faulty(str(number)) for number in range(12)]

    def note(number: int, _: object) -> None:
        settled.append(number)

    gate = storages[0].gate("list")
    tensor = torch.zeros(100_000)
    handles = []
    for number, storage in enumerate(storages):
        handles.append(checkpointer.save(storage, {"w": tensor, "n": number}))
        handles[-1].add_done_callback(partial(note, number))
    handles[0].staged.result()
    assert not any(handle.done() for handle in handles)
    gate.release.set()
    for handle in handles:
        handle.result()
    for number, storage in enumerate(storages):
        assert checkpointer.load(storage).result()["n"] == number
    checkpointer.close()
    assert settled == list(range(12))


def test_several_saves_through_a_ring_of_one_slot(opened: Opened, bits: Any) -> None:
    checkpointer = opened(staging_bytes=1)
    torch.manual_seed(0)
    state = {"t": torch.randn(3000, 2100).t(), "e": torch.randn(2_500_000, 1).expand(2_500_000, 2), "s": torch.ones(3)}
    storages = [MemoryStorage(str(number)) for number in range(4)]
    handles = [checkpointer.save(storage, state) for storage in storages]
    for handle, storage in zip(handles, storages, strict=True):
        handle.result()
        loaded = checkpointer.load(storage).result()
        assert all(torch.equal(bits(loaded[name]), bits(tensor)) for name, tensor in state.items())
    arena = lanes(checkpointer).arenas._current
    assert arena is not None
    assert (arena.slots, arena.ring.statistics().in_use, arena.users) == (1, 0, 0)


def test_two_savers_on_different_threads(checkpointer: AsyncCheckpointer) -> None:
    storages = [[MemoryStorage(f"{thread}-{number}") for number in range(8)] for thread in range(4)]
    ready = threading.Barrier(4)

    def save(thread: int) -> None:
        ready.wait(30)
        handles = [
            checkpointer.save(storage, {"w": torch.full((1000,), thread), "n": n})
            for n, storage in enumerate(storages[thread])
        ]
        assert all(handle.result().tensors == 1 for handle in handles)

    threads = [threading.Thread(target=save, args=(n,)) for n in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for thread, row in enumerate(storages):
        for n, storage in enumerate(row):
            loaded = checkpointer.load(storage).result()
            assert loaded["n"] == n and bool((loaded["w"] == thread).all())


@pytest.mark.parametrize("place", ["_engine.submit", "_planner._plans.get", "_pending.add"])
def test_a_signals_handler_may_save_in_the_middle_of_a_save(
    checkpointer: AsyncCheckpointer, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    handles: list[SaveHandle] = []
    owner, name = attrgetter(place.rpartition(".")[0])(checkpointer), place.rpartition(".")[2]
    function = getattr(owner, name)

    def interrupted(*args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        handles.append(checkpointer.save(storages[0], {"n": 0}))  # on the same thread, as a handler is run
        return function(*args, **options)

    storages = [MemoryStorage(), MemoryStorage()]
    monkeypatch.setattr(owner, name, interrupted)
    handles.append(checkpointer.save(storages[1], {"n": 1}))
    assert len({handle.result(LONG).save_id for handle in handles}) == 2
    assert [checkpointer.load(storage).result(LONG)["n"] for storage in storages] == [0, 1]


def test_a_save_that_control_c_cuts_off_gives_its_copies_back(
    checkpointer: AsyncCheckpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        assert checkpointer._eager.used
        raise KeyboardInterrupt

    with checkpointer.guard(torch.optim.SGD([torch.nn.Parameter(torch.ones(3))])):
        monkeypatch.setattr(checkpointer._engine, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save(MemoryStorage(), {"copied": torch.ones(5)})
        monkeypatch.undo()
    assert checkpointer._eager.used == 0


def test_a_slow_done_callback_holds_up_neither_the_training_nor_a_load(
    checkpointer: AsyncCheckpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, copy = MemoryStorage(), SlabCopier.copy
    called, returns, copied = threading.Event(), threading.Event(), threading.Event()

    def slow(_: object) -> None:
        called.set()
        returns.wait(LONG)

    def copies(*args: Any) -> Any:
        assert copied.wait(30)
        return copy(*args)

    target = {"w": torch.zeros(3)}
    checkpointer.save(storage, {"w": torch.ones(3)}).add_done_callback(slow)
    try:
        assert called.wait(30)
        monkeypatch.setattr(SlabCopier, "copy", copies)
        checkpointer.save(MemoryStorage(), target)
        staged, loaded = checkpointer.wait_staged(), checkpointer.load(storage, target)
        copied.set()
        staged.result(60)
        assert loaded.result(60)["w"].tolist() == [1, 1, 1]
    finally:
        returns.set()


def test_a_done_callback_may_save(checkpointer: AsyncCheckpointer) -> None:
    handles, begun = [], threading.Event()

    def again(_: object) -> None:
        handles.append(checkpointer.save(second, {"w": torch.ones(2)}))
        begun.set()

    first, second = MemoryStorage(), MemoryStorage()
    checkpointer.save(first, {"w": torch.ones(1)}).add_done_callback(again)
    assert begun.wait(30)
    assert handles[0].result().tensors == 1


# ── awaiting ──


def on_uvloop(main: Callable[[], Any]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


@pytest.mark.parametrize("run", [lambda main: asyncio.run(main()), on_uvloop, trio.run])
def test_on_every_loop(run: Callable[[Any], None], tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncCheckpointer(process=False) as checkpointer:
            state = {"w": torch.arange(100_000)}
            await checkpointer.prepare(state)
            handle = checkpointer.save(tmp_path / "it", state)
            await handle.staged
            result = await handle
            assert result is await handle.committed
            loaded = await checkpointer.load(tmp_path / "it")
            assert torch.equal(loaded["w"], state["w"])
            checkpointer.save(tmp_path / "two", state)
        assert await_record(tmp_path / "two")

    run(main)


def await_record(folder: Path) -> bool:
    return len(save_ids(folder)) == 1


async def test_a_handle_unpacks_and_says_where_it_is(checkpointer: AsyncCheckpointer, faulty: Any) -> None:
    storage = faulty("place")
    gate = storage.gate("write")
    handle = checkpointer.save(storage, {"w": torch.ones(1)})
    staged, committed = handle
    assert (staged, committed) == (handle.staged, handle.committed)
    await staged
    assert repr(handle) == "<SaveHandle 'place' writing>"
    assert handle.path == "place"
    gate.release.set()
    assert (await committed).tensors == 1
    assert repr(handle) == "<SaveHandle 'place' settled>"
    assert handle.exception() is None


async def test_cancelling_a_task_that_awaits_does_not_cancel_the_save(
    checkpointer: AsyncCheckpointer, faulty: Any
) -> None:
    storage = faulty()
    gate = storage.gate("write")
    handle = checkpointer.save(storage, {"w": torch.ones(1)})

    async def wait() -> None:
        await handle

    task = asyncio.create_task(wait())
    await asyncio.to_thread(gate.wait_begun)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(wait(), 0.01)
    gate.release.set()
    assert (await handle).tensors == 1


# ── results, the blocking twin, cost ──


def test_a_result_has_sizes_and_times(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
    handle = checkpointer.save(tmp_path / "it", {"a": torch.zeros(MIB), "b": torch.zeros(3, dtype=torch.int8)})
    result = handle.result()
    assert result.path == str(tmp_path / "it") == handle.path
    assert (result.tensors, result.tensor_bytes) == (2, 4 * MIB + 3)
    assert result.stored_bytes == sum(path.stat().st_size for path in (tmp_path / "it").glob("*.safetensors"))
    assert 0 < result.staged_seconds <= result.durable_seconds
    assert {"stage", "transform", "write", "sync", "commit"} <= set(result.stage_seconds)
    assert result.bytes_per_second > 0


def test_the_blocking_twin(tmp_path: Path) -> None:
    with SyncCheckpointer(Options(staging_bytes=8 * MIB), process=False) as checkpointer:
        state = {"w": torch.arange(10)}
        checkpointer.prepare(state)
        assert checkpointer.save(tmp_path / "it", state).tensors == 1
        target = {"w": torch.zeros(10, dtype=torch.int64)}
        assert checkpointer.load(tmp_path / "it", target) is target
        assert torch.equal(target["w"], state["w"])
        assert torch.equal(checkpointer.load(tmp_path / "it")["w"], state["w"])
        with pytest.raises(CheckpointExists):
            checkpointer.save(tmp_path / "it", state)
        with pytest.raises(CheckpointNotFound):
            checkpointer.load(tmp_path / "other")
