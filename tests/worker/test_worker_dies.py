"""The worker is killed, or stopped: its saves fail for sure or are committed, and the next save has a new worker."""

from __future__ import annotations

import itertools
import os
import select
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncdcp import AsyncCheckpointer, SaveHandle
from asyncdcp.errors import (
    CheckpointNotFound,
    CommitUnknown,
    DeadlineExceeded,
    PeerError,
    StorageError,
    WorkerCrashed,
)
from asyncdcp.pipeline.records import read_records
from asyncdcp.storage.faults import FaultyStorage
from asyncdcp.storage.spec import Fault
from asyncdcp.worker import session
from asyncdcp.worker.fence import settle_without_worker
from asyncdcp.worker.protocol import Leave
from tests.work import let_pass
from tests.worker.conftest import LONG, Opened, has_ended, state, worker_of

pytestmark = pytest.mark.filterwarnings("ignore::asyncdcp.errors.VolatileStorageWarning")

Closing = Callable[[int], int]


def loaded(checkpointer: AsyncCheckpointer, path: Path) -> int:
    found = checkpointer.load(path).result(LONG)
    assert torch.all(found["w"] == found["number"])
    return int(found["number"])


def small(number: int) -> dict[str, Any]:
    """A state that is saved within a deadline that was set to pass."""
    return {"w": torch.full((9,), number), "number": number}


def pidfd_of(checkpointer: AsyncCheckpointer) -> int:
    return os.pidfd_open(worker_of(checkpointer).pid)


def wait_for_either(worker: int, handle: SaveHandle) -> None:
    """Until the worker has died or the save is settled."""
    settled = os.eventfd(0)
    handle.add_done_callback(lambda _: os.eventfd_write(settled, 1))
    poll = select.poll()
    poll.register(worker, select.POLLIN)
    poll.register(settled, select.POLLIN)
    assert poll.poll(LONG * 1000)
    handle.add_done_callback(lambda _: os.close(settled))


def check_crash(error: BaseException | None, handle: SaveHandle, number: int = signal.SIGKILL) -> None:
    assert isinstance(error, WorkerCrashed)
    assert isinstance(error, PeerError)
    assert error.signal == number
    assert error.path == handle.path
    assert error.save is not None and error.save in str(error)
    assert str(int(number)) in str(error)


def test_killed_at_every_call_that_it_makes(opened: Opened, closing: Closing, folder: Path) -> None:
    checkpointer, old = opened(), folder / "old"
    checkpointer.save(old, state(0, slabs=2)).result(LONG)
    committed = failed = 0
    for point in itertools.count(1, 2):
        path = folder / str(point)
        shutil.copytree(old, path, copy_function=os.link)
        worker = closing(pidfd_of(checkpointer))
        storage = FaultyStorage(path, [Fault("any", point, "kill")])
        handle = checkpointer.save(storage, state(point, slabs=2), overwrite=True)
        wait_for_either(worker, handle)
        error = handle.exception(LONG)
        if error is not None:
            check_crash(error, handle)
        assert loaded(checkpointer, path) == (point if error is None else 0)
        shutil.rmtree(path)
        failed, committed = failed + (error is not None), committed + (error is None)
        if not has_ended(worker, 0):
            break
    assert failed > 5
    assert committed > 1  # killed after its Record was out: that is found, and counts


def test_a_commit_found_after_a_death_is_made_durable_before_it_counts(opened: Opened, folder: Path) -> None:
    """The worker dies with its Record linked, before the directory is synced: the last sync of all."""

    class Counting(FaultyStorage):
        barriers = 0

        async def barrier(self) -> None:
            self.barriers += 1
            await super().barrier()

    checkpointer = opened()
    found = []
    for point in itertools.count(1):
        storage = Counting(folder / str(point), [Fault("fsync", point, "kill")])
        handle = checkpointer.save(storage, {"w": torch.arange(9)})
        error = handle.exception(LONG)
        if error is None and not storage.barriers:
            break  # the worker lives: there are fewer syncs
        found.append((error is None, storage.barriers > 0))
    assert found[-1] == (True, True)
    assert set(found[:-1]) == {(False, False)}


def test_killed_between_saves(opened: Opened, closing: Closing, folder: Path) -> None:
    checkpointer = opened()
    for number in range(3):
        worker = closing(pidfd_of(checkpointer))
        checkpointer.save(folder / str(number), state(number)).result(LONG)
        os.kill(worker_of(checkpointer).pid, signal.SIGKILL)
        assert has_ended(worker)
    checkpointer.save(folder / "last", state(9)).result(LONG)
    assert loaded(checkpointer, folder / "last") == 9


def test_every_save_of_a_dead_worker_fails_and_leaves_no_files(opened: Opened, folder: Path) -> None:
    checkpointer = opened(staging_bytes=8 * (8 << 20))
    storage = FaultyStorage(folder / "first", [Fault("fsync", 1, "stop")])
    handles = [checkpointer.save(storage, state(1)), checkpointer.save(folder / "second", state(2))]
    handles[1].staged.result(LONG)
    os.kill(worker_of(checkpointer).pid, signal.SIGKILL)
    for handle in handles:
        check_crash(handle.exception(LONG), handle)
    assert not (folder / "second").exists()
    assert all(name.endswith(".json") and "index" not in name for name in os.listdir(folder / "first"))
    checkpointer.save(folder / "third", state(3)).result(LONG)
    assert loaded(checkpointer, folder / "third") == 3


def test_killed_before_the_state_is_staged(opened: Opened, folder: Path) -> None:
    checkpointer = opened(staging_bytes=8 << 20)
    handle = checkpointer.save(FaultyStorage(folder, [Fault("pwrite", 2, "kill")]), state(1, slabs=6))
    for future in handle:
        check_crash(future.exception(LONG), handle)
    checkpointer.save(folder, state(2, slabs=6)).result(LONG)
    assert loaded(checkpointer, folder) == 2


# ── SIGSTOP ──


def stopped(checkpointer: AsyncCheckpointer) -> None:
    """Returns when the worker is stopped in the middle of its save, and the save's deadline has passed."""
    process, options = worker_of(checkpointer), checkpointer._options
    assert os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    let_pass(checkpointer._engine, options.save_deadline + session.PATIENCE * options.settle_seconds)


def unkillable(checkpointer: AsyncCheckpointer) -> Callable[[], None]:
    """SIGKILL does nothing to the worker, and its trainer does not wait long for it to die. Returns the real kill."""
    process, seconds = worker_of(checkpointer), session.KILL_PATIENCE * checkpointer._options.settle_seconds
    kill = process._send_kill
    process._send_kill = lambda: let_pass(checkpointer._engine, seconds)  # type: ignore[method-assign]
    return kill


def outcomes(storage: FaultyStorage, checkpointer: AsyncCheckpointer) -> list[str]:
    async def read() -> list[str]:
        return [record.outcome for record in await read_records(storage, await storage.list())]

    return checkpointer._engine.submit(read).result(LONG)


STOPPED_AT = [("link", 1), ("pwrite", 2), ("fsync", 1), ("mkdir", 1)]


@pytest.mark.parametrize(("operation", "number"), STOPPED_AT)
def test_stopped_through_its_deadline_it_is_killed(
    opened: Opened, closing: Closing, folder: Path, operation: str, number: int
) -> None:
    checkpointer = opened()
    worker = closing(pidfd_of(checkpointer))
    storage = FaultyStorage(folder / "stopped", [Fault(operation, number, "stop")])
    handle = checkpointer.save(storage, state(1))
    stopped(checkpointer)
    with pytest.raises(DeadlineExceeded, match="save_deadline"):
        handle.result(LONG)
    assert has_ended(worker, 0)
    assert "commit" not in outcomes(storage, checkpointer)
    checkpointer.save(folder / "next", small(2)).result(LONG)
    assert loaded(checkpointer, folder / "next") == 2


@pytest.mark.parametrize(("operation", "number"), STOPPED_AT)
def test_stopped_unkillable_and_woken_later_it_neither_publishes_nor_writes_what_is_not_its_own(
    opened: Opened, closing: Closing, folder: Path, operation: str, number: int
) -> None:
    """As a worker in an uninterruptible wait of the kernel: SIGKILL does nothing to it until it wakes."""
    checkpointer = opened()
    process = worker_of(checkpointer)
    worker, kill = closing(os.pidfd_open(process.pid)), unkillable(checkpointer)
    storage = FaultyStorage(folder / "stopped", [Fault(operation, number, "stop")])
    handle = checkpointer.save(storage, state(1))
    stopped(checkpointer)
    with pytest.raises(DeadlineExceeded, match="save_deadline"):
        handle.result(LONG)
    assert not has_ended(worker, 0)
    assert outcomes(storage, checkpointer) == ["abort"]

    arena = process._arenas.copy()
    checkpointer.save(folder / "next", small(2)).result(LONG)
    assert worker_of(checkpointer) is not process
    assert not set(arena) & set(worker_of(checkpointer)._arenas), "the memory of a lost worker is in use again"

    os.kill(process.pid, signal.SIGCONT)
    process._send_kill = kill  # type: ignore[method-assign]
    checkpointer._engine.call(process.post, Leave())  # it exits once it has settled the save in its own eyes
    assert has_ended(worker)
    with pytest.raises(CheckpointNotFound):
        checkpointer.load(folder / "stopped").result(LONG)
    assert outcomes(storage, checkpointer) == ["abort"]
    assert all(name.endswith(".json") for name in os.listdir(folder / "stopped"))
    assert loaded(checkpointer, folder / "next") == 2


def test_a_fenced_worker_that_wakes_in_the_middle_of_it_disturbs_nobody(
    opened: Opened, closing: Closing, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what it has to say, and dies, while the trainer settles its save."""
    checkpointer = opened()
    process = worker_of(checkpointer)
    worker, kill = closing(os.pidfd_open(process.pid)), unkillable(checkpointer)

    async def settle(*args: Any, **kwargs: Any) -> Any:
        os.kill(process.pid, signal.SIGCONT)
        kill()
        await process.died.wait()
        return await settle_without_worker(*args, **kwargs)

    monkeypatch.setattr(session, "settle_without_worker", settle)
    handle = checkpointer.save(FaultyStorage(folder / "stopped", [Fault("pwrite", 2, "stop")]), state(1))
    stopped(checkpointer)
    with pytest.raises(DeadlineExceeded):
        handle.result(LONG)
    assert has_ended(worker)
    checkpointer.save(folder / "next", small(2)).result(LONG)
    assert loaded(checkpointer, folder / "next") == 2


def test_saves_behind_one_whose_worker_does_not_die_do_not_wait_their_deadlines(opened: Opened, folder: Path) -> None:
    checkpointer, small = opened(), {"w": torch.arange(9)}
    checkpointer.prepare(state(0)).result(LONG)  # a slot for each
    process, kill = worker_of(checkpointer), unkillable(checkpointer)
    handles = [checkpointer.save(FaultyStorage(folder / "0", [Fault("pwrite", 1, "stop")]), small)]
    handles += [checkpointer.save(folder / str(number), small) for number in (1, 2)]
    for handle in handles:
        handle.staged.result(LONG)  # from here on it is the worker's
    stopped(checkpointer)
    assert isinstance(handles[0].exception(LONG), DeadlineExceeded)
    for handle in handles[1:]:
        assert isinstance(handle.exception(LONG), WorkerCrashed)
    checkpointer.save(folder / "next", small).result(LONG)
    process._send_kill = kill  # type: ignore[method-assign]
    checkpointer._engine.call(process.kill)


def test_nobody_can_tell_is_said_so(opened: Opened, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker does not die, and the storage does not take the abort: whether it will be committed is unknown."""
    checkpointer = opened()
    process, kill = worker_of(checkpointer), unkillable(checkpointer)
    storage = FaultyStorage(folder, [Fault("pwrite", 1, "stop")])

    async def broken(*_: object) -> bool:
        raise StorageError("the storage is gone", errno=5)

    monkeypatch.setattr(storage, "claim", broken)
    handle = checkpointer.save(storage, state(1))
    stopped(checkpointer)
    with pytest.raises(CommitUnknown) as caught:
        handle.result(LONG)
    assert isinstance(caught.value.__cause__, DeadlineExceeded)
    process._send_kill = kill  # type: ignore[method-assign]
    checkpointer._engine.call(process.kill)


def test_a_dead_workers_save_is_known_even_if_the_storage_takes_no_abort(
    opened: Opened, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = opened()
    storage = FaultyStorage(folder, [Fault("link", 1, "kill")])

    async def broken(*_: object) -> bool:
        raise StorageError("the storage takes nothing", errno=28)

    monkeypatch.setattr(storage, "claim", broken)
    handle = checkpointer.save(storage, state(1))
    check_crash(handle.exception(LONG), handle)
