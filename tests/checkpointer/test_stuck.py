"""Storages that hang: deadlines, arenas that are lost and never used again, and how a checkpointer closes."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
import torch

from asyncdcp import AsyncCheckpointer, MemoryStorage, Options, SaveHandle
from asyncdcp.checkpointer.saving import SaveTask
from asyncdcp.errors import (
    Cancelled,
    Closed,
    CommitUnknown,
    DeadlineExceeded,
    WouldDeadlock,
)
from asyncdcp.staging.copier import SlabCopier
from tests.checkpointer.conftest import SMALL, STATE, Opened, close_patiently, works
from tests.work import LONG, let_pass

MIB = 1 << 20


# ── a storage that hangs ──


@pytest.mark.parametrize("staging_bytes", [None, 8 * MIB])
@pytest.mark.parametrize("operation", ["list", "create", "write", "finish", "barrier", "put", "claim"])
def test_a_stuck_storage_fails_in_time_and_the_next_save_works(
    opened: Opened, faulty: Any, operation: str, staging_bytes: int | None
) -> None:
    checkpointer = opened(settle_seconds=0.05, staging_bytes=staging_bytes)
    storage, behind = faulty("stuck"), MemoryStorage("behind")
    gate = storage.gate(operation)
    handle = checkpointer.save(storage, STATE)
    following = checkpointer.save(behind, STATE)  # it waits for slots of the arena that is about to be lost
    gate.wait_begun()
    handle.cancel()
    with pytest.raises(CommitUnknown, match="settle_seconds"):
        handle.result(20)
    assert following.result(20).tensors == 1
    assert torch.equal(checkpointer.load(behind).result()["w"], STATE["w"])
    stuck_arena = checkpointer._lanes.arenas._current
    storage.open_all()
    assert works(checkpointer)
    assert checkpointer._lanes.arenas._current is stuck_arena


@pytest.mark.parametrize("operation", ["write", "claim"])
def test_a_stuck_storage_meets_the_saves_own_deadline(opened: Opened, faulty: Any, operation: str) -> None:
    checkpointer = opened(save_deadline=0.05, settle_seconds=0.05)
    storage = faulty("stuck")
    storage.gate(operation)
    handle = checkpointer.save(storage, SMALL)
    with pytest.raises((DeadlineExceeded, CommitUnknown)):
        handle.result(20)
    storage.open_all()


def test_a_slow_storage_that_comes_back_in_time_to_settle(opened: Opened, faulty: Any) -> None:
    checkpointer = opened()
    storage = faulty("slow")
    gate = storage.gate("write")
    handle = checkpointer.save(storage, SMALL)
    gate.wait_begun()
    let_pass(checkpointer._engine, checkpointer._options.save_deadline)
    assert not handle.committed.wait(0.1)
    gate.release.set()
    with pytest.raises(DeadlineExceeded, match="save_deadline"):
        handle.result(20)
    assert all(name.endswith(".json") for name in storage.names)


def test_slots_that_a_stuck_save_holds_are_never_used_again(opened: Opened, faulty: Any) -> None:
    """A write that wakes late must find the bytes of its own save."""
    checkpointer = opened(settle_seconds=0.05)
    storage = faulty("stuck")
    gate = storage.gate("write")
    handle = checkpointer.save(storage, {"w": torch.full((4 * MIB,), 7, dtype=torch.uint8)})
    gate.wait_begun()
    arena = checkpointer._lanes.arenas._current
    assert arena is not None
    handle.cancel()
    with pytest.raises(CommitUnknown, match="stuck did not end"):
        handle.result(20)
    assert arena.abandoned
    for value in (1, 2, 3):
        checkpointer.save(MemoryStorage(), {"w": torch.full((4 * MIB,), value, dtype=torch.uint8)}).result()
    assert checkpointer._lanes.arenas._current is not arena
    assert bool((arena.slot(0)[4096 : 4 * MIB] == 7).all())
    gate.release.set()
    close_patiently(checkpointer)
    assert arena.arena.closed  # given back once the last write had ended


def test_a_fully_staged_save_survives_the_loss_of_the_arena(opened: Opened, faulty: Any) -> None:
    checkpointer = opened(settle_seconds=0.05)
    checkpointer.prepare({"w": torch.empty(20 * MIB)}).result()  # room for several
    storage, behind = faulty("stuck"), MemoryStorage("behind")
    gate = storage.gate("write")
    stuck = checkpointer.save(storage, STATE)
    following = checkpointer.save(behind, STATE)
    following.staged.result()
    gate.wait_begun()
    stuck.cancel()
    with pytest.raises(CommitUnknown):
        stuck.result(20)
    following.result(20)
    assert torch.equal(checkpointer.load(behind).result()["w"], STATE["w"])


def test_a_stuck_commit_costs_no_arena(opened: Opened, faulty: Any) -> None:
    """All slots are back by then."""
    checkpointer = opened(settle_seconds=0.05)
    storage = faulty("stuck")
    gate = storage.gate("claim")
    checkpointer.prepare(STATE).result()
    arena = checkpointer._lanes.arenas._current
    handle = checkpointer.save(storage, STATE)
    gate.wait_begun()
    handle.cancel()
    with pytest.raises(CommitUnknown):
        handle.result(20)
    assert works(checkpointer)
    assert checkpointer._lanes.arenas._current is arena


def test_a_copy_that_hangs(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = opened(settle_seconds=0.05)
    begun, release = threading.Event(), threading.Event()

    def stuck(*_: Any) -> None:
        begun.set()
        assert release.wait(30)

    monkeypatch.setattr(SlabCopier, "copy", stuck)
    handle = checkpointer.save(MemoryStorage("stuck"), STATE)
    assert begun.wait(30)
    handle.cancel()
    for future in handle:
        with pytest.raises(CommitUnknown):
            future.result(20)
    monkeypatch.undo()
    assert works(checkpointer)
    release.set()


def test_a_save_that_was_cancelled_and_left_behind_comes_to_its_end(
    opened: Opened, faulty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error was raised in coroutines that still wait then: they are not to be closed."""
    checkpointer = opened(settle_seconds=0.05)
    checkpointer.prepare(STATE).result()
    storage = faulty("first")
    writing, copying, release = storage.gate("write"), threading.Event(), threading.Event()
    first = checkpointer.save(storage, SMALL)
    first.staged.result()
    writing.wait_begun()

    def stuck(*_: Any) -> None:
        copying.set()
        assert release.wait(30)

    ends: list[BaseException | None] = []
    run = SaveTask.run

    async def ending(task: SaveTask) -> None:
        try:
            await run(task)
        except BaseException as error:
            ends.append(error)
            raise
        ends.append(None)

    monkeypatch.setattr(SlabCopier, "copy", stuck)
    monkeypatch.setattr(SaveTask, "run", ending)
    second = checkpointer.save(MemoryStorage("second"), STATE)
    assert copying.wait(30)
    second.cancel()
    with pytest.raises(Cancelled):
        second.result(20)
    monkeypatch.undo()
    release.set()
    storage.open_all()
    close_patiently(checkpointer)
    assert ends == [None]


def test_deadlines_do_not_outlive_the_save(checkpointer: AsyncCheckpointer) -> None:
    checkpointer.save(MemoryStorage(), SMALL).result()
    loop = checkpointer._engine._loop
    assert loop is not None
    timers: list[Any] = []
    done = threading.Event()

    def look() -> None:
        timers.extend(loop._scheduled)  # type: ignore[attr-defined]  # asyncio's own heap
        done.set()

    checkpointer._engine.call(look)
    assert done.wait(30)
    assert not [timer for timer in timers if not timer.cancelled()]


# ── close ──


@pytest.mark.parametrize("operation", ["write", "claim"])
def test_close_gives_up_what_is_stuck_within_its_deadlines(faulty: Any, operation: str) -> None:
    storage = faulty("the stuck place")
    storage.gate(operation)
    checkpointer = AsyncCheckpointer(Options(close_deadline=0.1, settle_seconds=0.1), process=False)
    handle = checkpointer.save(storage, SMALL)
    waiting = checkpointer.save(MemoryStorage("another place"), SMALL)
    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        checkpointer.close()
    assert time.monotonic() - begun < 10
    for part in ("the stuck place", "another place", "close_deadline"):
        assert part in str(caught.value)
    for each in (handle, waiting):
        assert each.committed.failed
    checkpointer.close()
    with pytest.raises(Closed):
        checkpointer.save(MemoryStorage(), SMALL)


def test_close_gives_up_what_waits_before_what_it_waits_for(faulty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, cancel = faulty("the stuck place"), SaveHandle.cancel
    storage.gate("write")

    def cancelled(handle: SaveHandle) -> bool:
        return cancel(handle) and handles[1].committed.wait(LONG)

    monkeypatch.setattr(SaveHandle, "cancel", cancelled)
    checkpointer = AsyncCheckpointer(Options(close_deadline=0.1, settle_seconds=0.1), process=False)
    handles = [checkpointer.save(target, SMALL) for target in (storage, MemoryStorage("another place"))]
    with pytest.raises(DeadlineExceeded, match="another place"):
        checkpointer.close()
    assert all(handle.committed.failed for handle in handles)


def test_close_says_what_was_left_behind_earlier(faulty: Any) -> None:
    """A save that was given up by its own deadline, and whose failure somebody saw."""
    storage = faulty("the stuck place")
    gate = storage.gate("claim")
    checkpointer = AsyncCheckpointer(Options(settle_seconds=0.05), process=False)
    handle = checkpointer.save(storage, SMALL)
    gate.wait_begun()
    let_pass(checkpointer._engine, checkpointer._options.save_deadline)
    with pytest.raises(CommitUnknown):
        handle.result(20)
    with pytest.raises(DeadlineExceeded, match="the stuck place"):
        checkpointer.close()


def test_close_waits_for_what_is_pending(faulty: Any) -> None:
    storage = faulty()
    gate = storage.gate("write")
    checkpointer = AsyncCheckpointer(process=False)
    handles = [checkpointer.save(target, SMALL) for target in (storage, MemoryStorage(), MemoryStorage())]
    closing = threading.Thread(target=checkpointer.close)
    closing.start()
    gate.wait_begun()
    gate.release.set()
    closing.join(30)
    assert [handle.result().tensors for handle in handles] == [1, 1, 1]


def test_each_of_two_that_close_waits(faulty: Any) -> None:
    storage = faulty()
    gate = storage.gate("barrier", 1)
    checkpointer = AsyncCheckpointer(process=False)
    handle = checkpointer.save(storage, SMALL)
    gate.wait_begun()
    seen: list[bool] = []

    def close() -> None:
        checkpointer.close()
        seen.append(handle.done())

    threads = [threading.Thread(target=close) for _ in range(2)]
    for thread in threads:
        thread.start()
    threads[0].join(0.2)
    threads[1].join(0.2)
    assert not seen
    gate.release.set()
    for thread in threads:
        thread.join(30)
    assert seen == [True, True]


def test_close_in_a_done_callback_is_refused_and_nothing_is_closed(checkpointer: AsyncCheckpointer) -> None:
    caught, done = list[BaseException](), threading.Event()

    def close(_: object) -> None:
        try:
            checkpointer.close()
        except WouldDeadlock as error:
            caught.append(error)
        done.set()

    checkpointer.save(MemoryStorage(), SMALL).add_done_callback(close)
    assert done.wait(30)
    assert caught
    assert works(checkpointer)


def test_endless_deadlines(faulty: Any) -> None:
    forever = float("inf")
    options = Options(save_deadline=forever, load_deadline=forever, close_deadline=forever, settle_seconds=forever)
    with AsyncCheckpointer(options, process=False) as checkpointer:
        storage = MemoryStorage()
        handle = checkpointer.save(storage, SMALL)
        assert handle.result(forever).tensors == 1
        checkpointer.load(storage).result()
        checkpointer.save(MemoryStorage(), SMALL)


async def test_aclose_is_not_cut_short(faulty: Any) -> None:
    storage = faulty()
    gate = storage.gate("write")
    checkpointer = AsyncCheckpointer(process=False)
    handle = checkpointer.save(storage, SMALL)
    await handle.staged
    task = asyncio.create_task(checkpointer.aclose())
    await asyncio.to_thread(gate.wait_begun)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=0.05)
    assert not done
    gate.release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert handle.result().tensors == 1
    with pytest.raises(Closed):
        checkpointer.save(MemoryStorage(), SMALL)
