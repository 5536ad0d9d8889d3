"""Storages that fail, storages that hang, staging that fails; deadlines; failures that nobody has looked at."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncdcp import AsyncCheckpointer, LocalStorage, MemoryStorage, Options
from asyncdcp.errors import (
    AsyncDCPError,
    CheckpointNotFound,
    Closed,
    CommitUnknown,
    DeadlineExceeded,
    MemoryLimit,
    StorageError,
    StorageFull,
    UnseenFailure,
    WouldDeadlock,
)
from asyncdcp.staging import arenas
from asyncdcp.staging.copier import SlabCopier
from asyncdcp.storage.posix import OS

Opened = Callable[..., AsyncCheckpointer]
MIB = 1 << 20
STATE = {"w": torch.arange(17 * MIB // 4, dtype=torch.float32)}  # three slabs
SMALL = {"w": torch.arange(10)}


def idle(checkpointer: AsyncCheckpointer) -> bool:
    arena = checkpointer._lanes.arenas._current
    assert arena is not None
    return (arena.users, arena.ring.statistics().in_use) == (0, 0)


def works(checkpointer: AsyncCheckpointer, state: dict[str, torch.Tensor] = STATE) -> bool:
    storage = MemoryStorage("after")
    checkpointer.save(storage, state).result()
    return torch.equal(checkpointer.load(storage).result()["w"], state["w"]) and idle(checkpointer)


# ── a storage that fails ──


@pytest.mark.parametrize("staging_bytes", [None, 8 * MIB])
@pytest.mark.parametrize(
    "point",
    [("list", 1), ("create", 1), ("write", 1), ("write", 3), ("finish", 1), ("barrier", 1), ("put", 1), ("barrier", 2)],
    ids=lambda point: "-".join(map(str, point)),
)
def test_an_operation_that_fails(
    opened: Opened, faulty: Any, staging_bytes: int | None, point: tuple[str, int]
) -> None:
    checkpointer, storage = opened(staging_bytes=staging_bytes), faulty()
    storage.errors[point] = StorageFull("no space left on device", errno=errno.ENOSPC)
    handle = checkpointer.save(storage, STATE)
    behind = checkpointer.save(MemoryStorage("behind"), STATE)
    with pytest.raises(StorageFull, match="no space"):
        handle.result()
    assert handle.staged.done()
    assert behind.result().tensors == 1
    with pytest.raises(CheckpointNotFound):
        checkpointer.load(storage).result()
    assert not storage.unfinished
    assert all(name.endswith(".json") for name in storage.names)
    assert works(checkpointer)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), RuntimeError("a bug in somebody's storage")])
def test_foreign_errors_are_translated_and_kept_as_cause(opened: Opened, faulty: Any, error: Exception) -> None:
    checkpointer, storage = opened(), faulty()
    storage.errors["write", 2] = error
    handle = checkpointer.save(storage, STATE)
    with pytest.raises(AsyncDCPError) as caught:
        handle.result()
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, StorageError) == isinstance(error, OSError)
    assert works(checkpointer)


class FailingOS(OS):
    """The n-th write has no space, or the first fsync of a data file fails."""

    def __init__(self, call: str) -> None:
        self.call = call
        self.writes = 0

    def pwrite(self, fd: int, buffer: memoryview, offset: int, /) -> int:
        self.writes += 1
        if self.call == "pwrite" and self.writes == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().pwrite(fd, buffer, offset)

    def fsync(self, fd: int, /) -> None:
        if self.call == "fsync":
            self.call = ""
            raise OSError(errno.EIO, "Input/output error")
        super().fsync(fd)


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_is_full_or_broken(opened: Opened, tmp_path: Path, call: str) -> None:
    checkpointer, folder = opened(), tmp_path / "it"
    handle = checkpointer.save(LocalStorage(folder, posix=FailingOS(call)), STATE)
    with pytest.raises(StorageFull if call == "pwrite" else StorageError):
        handle.result()
    assert [path.suffix for path in folder.iterdir()] == [".json"]
    checkpointer.save(folder, STATE).result()
    assert torch.equal(checkpointer.load(folder).result()["w"], STATE["w"])


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
    checkpointer = opened(save_deadline=0.05)
    storage = faulty("slow")
    gate = storage.gate("write")
    handle = checkpointer.save(storage, SMALL)
    gate.wait_begun()
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
    checkpointer.close()
    assert arena.arena.closed  # given back once the last write had ended


def test_a_fully_staged_save_survives_the_loss_of_the_arena(opened: Opened, faulty: Any) -> None:
    checkpointer = opened(settle_seconds=0.05)
    checkpointer.prepare({"w": torch.empty(20 * MIB)}).result()  # room for several
    storage, behind = faulty("stuck"), MemoryStorage("behind")
    storage.gate("write")
    stuck = checkpointer.save(storage, STATE)
    following = checkpointer.save(behind, STATE)
    following.staged.result()
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


# ── staging that fails ──


def test_staging_that_fails_fails_both_futures_and_leaves_no_trace(
    opened: Opened, faulty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("a copy that fails")

    checkpointer, storage = opened(), faulty()
    for target in ("copy", "__init__"):
        monkeypatch.setattr(SlabCopier, target, broken)
        handle = checkpointer.save(storage, STATE)
        for future in handle:
            with pytest.raises(AsyncDCPError, match="a copy that fails") as caught:
                future.result()
            assert isinstance(caught.value.__cause__, ValueError)
        monkeypatch.undo()
        assert all(name.endswith(".json") for name in storage.names)
    assert works(checkpointer)


def test_staging_that_fails_before_its_turn_to_write_does_not_wait_for_it(
    opened: Opened, faulty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer, storage, never = opened(), faulty(), faulty("never")
    gate = storage.gate("write")
    checkpointer.prepare(STATE).result()  # a slot for each
    first = checkpointer.save(storage, SMALL)
    first.staged.result()
    monkeypatch.setattr(SlabCopier, "copy", lambda *_: 1 / 0)
    with pytest.raises(AsyncDCPError, match="ZeroDivisionError"):
        checkpointer.save(never, SMALL).result(20)
    assert not never.calls
    assert not first.done()
    gate.release.set()
    first.result()


def test_a_state_larger_than_memory(opened: Opened, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpointer = opened()
    huge = {"w": torch.empty(1).expand(1 << 37)}
    handle = checkpointer.save(tmp_path / "it", huge)
    for future in handle:
        with pytest.raises(MemoryLimit, match="staging_bytes"):
            future.result()
    with pytest.raises(MemoryLimit):
        checkpointer.prepare(huge).result()
    assert not (tmp_path / "it").exists()
    assert works(checkpointer)

    def full(self: Any, number: int) -> None:
        raise MemoryLimit("gone meanwhile; give a smaller staging_bytes=")

    checkpointer.prepare({"w": torch.empty(10 * MIB)}).result()
    with monkeypatch.context() as patch:
        patch.setattr(arenas.StagingArena, "prefault", full)
        with pytest.raises(MemoryLimit):
            checkpointer.save(MemoryStorage(), STATE).result()
    assert works(checkpointer)


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


def test_close_says_what_was_left_behind_earlier(faulty: Any) -> None:
    """A save that was given up by its own deadline, and whose failure somebody saw."""
    storage = faulty("the stuck place")
    storage.gate("claim")
    checkpointer = AsyncCheckpointer(Options(save_deadline=0.05, settle_seconds=0.05), process=False)
    with pytest.raises(CommitUnknown):
        checkpointer.save(storage, SMALL).result(20)
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


# ── failures that nobody has looked at ──


def failing(faulty: Any, name: str = "faulty", after: str = "write") -> Any:
    storage = faulty(name)
    storage.errors[after, 1] = OSError(errno.EIO, "broken")
    return storage


def fail(checkpointer: AsyncCheckpointer, storage: Any) -> Any:
    """A save that has failed, and that nobody has looked at."""
    handle = checkpointer.save(storage, SMALL)
    assert handle.committed.wait(30)
    return handle


@pytest.mark.parametrize("verb", ["save", "load", "prepare", "close"])
def test_raised_at_the_next_verb_once(faulty: Any, verb: str) -> None:
    checkpointer = AsyncCheckpointer(process=False)
    fail(checkpointer, failing(faulty, "a place"))
    call: dict[str, Callable[[], object]] = {
        "save": lambda: checkpointer.save(MemoryStorage(), SMALL),
        "load": lambda: checkpointer.load(MemoryStorage()),
        "prepare": lambda: checkpointer.prepare(SMALL),
        "close": checkpointer.close,
    }
    with pytest.raises(UnseenFailure, match="an earlier save to a place failed") as caught:
        call[verb]()
    assert isinstance(caught.value.__cause__, StorageError)
    assert caught.value.path == "a place"
    checkpointer.close()


def test_several_are_all_named(faulty: Any) -> None:
    checkpointer = AsyncCheckpointer(process=False)
    handles = [checkpointer.save(failing(faulty, name), SMALL) for name in ("one", "two", "three")]
    handles[1].exception()
    assert handles[2].committed.wait(30)
    with pytest.raises(UnseenFailure, match="three") as caught:
        checkpointer.close()
    [note] = caught.value.__notes__
    assert note == f"an earlier save to one failed and nobody looked at it: {handles[0].exception()}"


@pytest.mark.parametrize("look", ["result", "exception", "staged", "await", "callback"])
def test_not_raised_once_looked_at(checkpointer: AsyncCheckpointer, faulty: Any, look: str) -> None:
    storage = failing(faulty, after="create" if look == "staged" else "write")
    handle = checkpointer.save(storage, STATE if look == "staged" else SMALL)
    if look == "callback":
        handle.add_done_callback(lambda future: future.exception())
        assert handle.committed.wait(30)
        flushed = threading.Event()
        handle.add_done_callback(lambda _: flushed.set())
        assert flushed.wait(30)
    elif look == "staged" and isinstance(handle.staged.exception(), StorageError):
        assert handle.committed.wait(30)
    elif look == "await":

        async def wait() -> None:
            with pytest.raises(StorageError):
                await handle

        asyncio.run(wait())
    else:
        handle.exception()
    checkpointer.prepare(SMALL).result()


async def test_a_failure_that_a_task_waits_for_is_the_tasks(checkpointer: AsyncCheckpointer, faulty: Any) -> None:
    """Even where the next verb comes first, before the loop has come to run that task."""
    handle = checkpointer.save(failing(faulty), SMALL)

    async def wait() -> None:
        with pytest.raises(StorageError):
            await handle

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    handle.committed.wait(30)
    checkpointer.prepare(SMALL)
    await task
    checkpointer.prepare(SMALL)


async def test_a_failure_whose_waiter_was_cancelled_is_raised(faulty: Any) -> None:
    checkpointer = AsyncCheckpointer(process=False)
    handle = checkpointer.save(failing(faulty), SMALL)

    async def wait() -> None:
        await handle

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    handle.committed.wait(30)
    task.cancel()
    with pytest.raises((asyncio.CancelledError, StorageError)) as caught:
        await task
    if isinstance(caught.value, StorageError):  # the outcome was faster than the cancellation
        await checkpointer.aclose()
    else:
        with pytest.raises(UnseenFailure):
            await checkpointer.aclose()


def test_on_error_warn_and_callable(faulty: Any) -> None:
    checkpointer = AsyncCheckpointer(Options(on_error="warn"), process=False)
    fail(checkpointer, failing(faulty, "one"))
    with pytest.warns(RuntimeWarning, match="save to one failed") as caught:
        checkpointer.prepare(SMALL).result()
    assert caught[0].filename == __file__
    fail(checkpointer, failing(faulty, "two"))
    with pytest.warns(RuntimeWarning, match="save to two failed"):
        checkpointer.close()

    errors: list[BaseException] = []
    checkpointer = AsyncCheckpointer(Options(on_error=errors.append), process=False)
    fail(checkpointer, failing(faulty))
    checkpointer.close()
    assert [type(error) for error in errors] == [StorageError]


def test_close_does_not_mask_an_error_of_the_block(faulty: Any) -> None:
    with pytest.raises(KeyError) as caught, AsyncCheckpointer(process=False) as checkpointer:
        fail(checkpointer, failing(faulty, "a place"))
        raise KeyError("the block's own")
    assert any("a place" in note for note in caught.value.__notes__)

    async def main() -> None:
        async with AsyncCheckpointer(process=False) as checkpointer:
            fail(checkpointer, failing(faulty, "a place"))
            raise KeyError("the block's own")

    with pytest.raises(KeyError):
        asyncio.run(main())

    def refuse(error: BaseException) -> None:
        raise ZeroDivisionError

    with pytest.raises(KeyError), AsyncCheckpointer(Options(on_error=refuse), process=False) as checkpointer:
        fail(checkpointer, failing(faulty))
        raise KeyError("the block's own")


def test_a_failure_without_another_error_is_raised_at_the_end_of_the_block(faulty: Any) -> None:
    with pytest.raises(UnseenFailure), AsyncCheckpointer(process=False) as checkpointer:
        fail(checkpointer, failing(faulty))


def test_warnings_stay_quiet_where_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with AsyncCheckpointer(process=False) as checkpointer:
            checkpointer.save(MemoryStorage(), SMALL)
