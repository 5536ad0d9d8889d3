"""Saves through the background process: the same results and errors as on a thread, and no more left behind."""

from __future__ import annotations

import gc
import os
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from asyncdcp import AsyncCheckpointer, MemoryStorage, Options, Progress
from asyncdcp.errors import (
    AsyncDCPError,
    DeadlineExceeded,
    ThreadPipelineWarning,
)
from asyncdcp.storage.faults import FaultyStorage
from asyncdcp.storage.spec import Fault
from tests.programs import Programs
from tests.work import open_descriptors
from tests.worker.conftest import LONG, SLAB, Opened, has_ended, state, worker_of

SMALL: dict[str, Any] = {"w": torch.arange(1000), "step": 3}


@pytest.fixture
def both(opened: Opened) -> Iterator[tuple[AsyncCheckpointer, AsyncCheckpointer]]:
    """One with a background process, one without."""
    with AsyncCheckpointer(process=False) as local:
        yield opened(), local


def error_of(checkpointer: AsyncCheckpointer, path: Any, **options: Any) -> AsyncDCPError:
    error = checkpointer.save(path, SMALL, **options).exception(LONG)
    assert isinstance(error, AsyncDCPError)
    return error


# ── the same ──


def test_results_are_the_same(both: tuple[AsyncCheckpointer, AsyncCheckpointer], tmp_path: Path) -> None:
    whole = {"a": torch.randn(3_000_000), "nested": [{"b": torch.ones(3, dtype=torch.bool)}, "text"], "n": None}
    for name in ("first", "second"):  # the second replaces the first
        results = []
        for checkpointer, mode in zip(both, ("process", "thread"), strict=True):
            results.append(checkpointer.save(tmp_path / mode, whole, overwrite=True, metadata={"n": name}).result(LONG))
        remote, local = results
        assert remote.stored_bytes == local.stored_bytes
        assert remote.tensor_bytes == local.tensor_bytes
        assert remote.filesystem == local.filesystem
        assert set(remote.stage_seconds) == set(local.stage_seconds)
        assert len(remote.replaced) == len(local.replaced)
        assert all(seconds >= 0 for seconds in remote.stage_seconds.values())
        assert remote.durable_seconds >= remote.staged_seconds > 0
    data = [
        {file.name[20:]: file.read_bytes() for file in (tmp_path / mode).glob("*.safetensors")}
        for mode in ("process", "thread")
    ]
    assert data[0] == data[1]
    found = both[1].load(tmp_path / "process").result(LONG)
    assert torch.equal(found["a"], whole["a"])  # type: ignore[arg-type]
    assert found["nested"][1] == "text"


def test_errors_are_the_same(both: tuple[AsyncCheckpointer, AsyncCheckpointer], tmp_path: Path) -> None:
    remote, local = both
    local.save(tmp_path / "there", SMALL).result(LONG)
    (tmp_path / "file").touch()
    for path in (tmp_path / "there", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        errors = error_of(remote, path), error_of(local, path)
        assert type(errors[0]) is type(errors[1])
        assert str(errors[0]) == str(errors[1])
        assert vars(errors[0]).keys() - {"__notes__"} == vars(errors[1]).keys()
        for name in vars(errors[1]):
            assert getattr(errors[0], name) == getattr(errors[1], name)
        assert getattr(errors[0], "errno", None) == getattr(errors[1], "errno", None)
        assert repr(errors[0].__cause__) == repr(errors[1].__cause__)
        assert "In the background process" in errors[0].__notes__[0]
        assert "settle.py" in errors[0].__notes__[0] or "writer.py" in errors[0].__notes__[0]


def test_progress_and_backpressure(opened: Opened, tmp_path: Path) -> None:
    heard: list[Progress] = []
    checkpointer = opened(staging_bytes=SLAB)
    handle = checkpointer.save(tmp_path, state(1, slabs=6), on_progress=heard.append)
    result = handle.result(LONG)
    done = threading.Event()
    checkpointer.save(tmp_path / "2", SMALL).add_done_callback(lambda _: done.set())  # callbacks come in order
    assert done.wait(LONG)
    assert {report.stage for report in heard} == {"stage", "write"}
    assert max(report.done for report in heard if report.stage == "write") == result.stored_bytes
    assert worker_of(checkpointer)._arenas.popitem()[0].slots == 1


def test_saves_are_committed_in_order(opened: Opened, tmp_path: Path) -> None:
    checkpointer, ended = opened(), list[int]()
    handles = [checkpointer.save(tmp_path / str(number), state(number)) for number in range(6)]
    for number, handle in enumerate(handles):
        handle.add_done_callback(lambda _, number=number: ended.append(number))  # type: ignore[misc]
    for handle in handles:
        handle.result(LONG)
    for number in range(6):
        found = checkpointer.load(tmp_path / str(number)).result(LONG)
        assert torch.all(found["w"] == number)


# ── what cannot travel ──


def test_what_cannot_travel_is_saved_on_a_thread_and_said_once(opened: Opened) -> None:
    checkpointer, storages = opened(), [MemoryStorage(), MemoryStorage()]
    with pytest.warns(ThreadPipelineWarning, match="MemoryStorage cannot be opened by the background") as warned:
        for storage in storages:
            checkpointer.save(storage, SMALL).result(LONG)
    assert len([w for w in warned if issubclass(w.category, ThreadPipelineWarning)]) == 1
    assert warned[0].filename == __file__
    assert checkpointer._lanes.pipeline.process is None  # type: ignore[attr-defined]
    assert torch.equal(checkpointer.load(storages[1]).result(LONG)["w"], SMALL["w"])


# ── the end ──


def test_close_waits_and_the_process_is_gone(tmp_path: Path) -> None:
    checkpointer = AsyncCheckpointer(process=True)
    pidfd = os.pidfd_open(worker_of(checkpointer).pid)
    handles = [checkpointer.save(tmp_path / str(number), state(number)) for number in range(3)]
    checkpointer.close()
    assert all(handle.done() and not handle.committed.failed for handle in handles)
    assert has_ended(pidfd, 0)
    os.close(pidfd)


def test_close_says_what_it_gave_up(tmp_path: Path) -> None:
    checkpointer = AsyncCheckpointer(Options(close_deadline=0.2, settle_seconds=2), process=True)
    pidfd = os.pidfd_open(worker_of(checkpointer).pid)
    storage = FaultyStorage(tmp_path / "stuck", [Fault("fsync", 1, "stop")])
    handles = [checkpointer.save(storage, SMALL), checkpointer.save(tmp_path / "behind", SMALL)]
    with pytest.raises(DeadlineExceeded, match="stuck") as caught:
        checkpointer.close()
    assert "behind" in str(caught.value)
    assert all(handle.done() for handle in handles)
    assert has_ended(pidfd, 0)
    os.close(pidfd)


@pytest.mark.parametrize("wait", ["", "handle.staged.result(30)"])
def test_exit_without_close_waits_and_leaves_no_process(programs: Programs, tmp_path: Path, wait: str) -> None:
    code = f"""
        import torch
        from asyncdcp import AsyncCheckpointer
        checkpointer = AsyncCheckpointer(process=True)
        handle = checkpointer.save("saved", {{"w": torch.full((5_000_000,), 7)}})
        print(checkpointer._engine.submit(checkpointer._lanes.pipeline.acquire).result(30).pid, flush=True)
        {wait}
    """
    done = programs.run("-c", textwrap.dedent(code), cwd=tmp_path, timeout=LONG)
    assert done.returncode == 0, done.stderr
    assert not Path(f"/proc/{int(done.stdout)}").exists()
    with AsyncCheckpointer(process=False) as reader:
        assert torch.all(reader.load(tmp_path / "saved").result(LONG)["w"] == 7)


@pytest.mark.filterwarnings("ignore::asyncdcp.errors.VolatileStorageWarning")
def test_many_saves_leak_nothing(opened: Opened, folder: Path) -> None:
    checkpointer = opened()

    def save(count: int) -> tuple[int, int, int]:
        for _ in range(count):
            checkpointer.save(folder / "same", SMALL, overwrite=True).result(LONG)
        seen = checkpointer._engine.submit(worker_of(checkpointer).inspect).result(LONG)
        children = len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
        assert seen.threads < 16 and threading.active_count() < threads + 16  # those of pools, which come and go
        return len(open_descriptors()), children, seen.descriptors

    threads = threading.active_count()
    save(40)
    before, rss = save(10), checkpointer._engine.submit(worker_of(checkpointer).inspect).result(LONG).rss_bytes
    after = save(150)
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)
    seen = checkpointer._engine.submit(worker_of(checkpointer).inspect).result(LONG)
    assert seen.rss_bytes - rss < 4_000_000  # a pool's thread may have come that was not there before
    assert (seen.arenas, seen.saves) == (1, 0)


def test_grown_arenas_are_given_back_there_too(opened: Opened, tmp_path: Path) -> None:
    checkpointer = opened()
    for slabs in (1, 2, 3, 4):
        checkpointer.save(tmp_path / str(slabs), state(slabs, slabs=slabs)).result(LONG)
    seen = checkpointer._engine.submit(worker_of(checkpointer).inspect).result(LONG)
    assert seen.arenas == 1
    maps = Path(f"/proc/{seen.pid}/maps").read_text()
    assert maps.count("asyncdcp-arena") == 1


def test_eight_at_once(tmp_path: Path) -> None:
    checkpointers = [AsyncCheckpointer(process=True) for _ in range(8)]
    handles = [each.save(tmp_path / str(number), state(number, 1)) for number, each in enumerate(checkpointers)]
    for handle in handles:
        handle.result(LONG)
    pidfds = [os.pidfd_open(worker_of(each).pid) for each in checkpointers]
    assert len(set(pidfds)) == 8
    for each in checkpointers:
        each.close()
    for number, pidfd in enumerate(pidfds):
        assert has_ended(pidfd, 0)
        os.close(pidfd)
        with AsyncCheckpointer(process=False) as reader:
            assert torch.all(reader.load(tmp_path / str(number)).result(LONG)["w"] == number)


def test_made_in_a_trio_program(tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncCheckpointer(process=True) as checkpointer:
            assert (await checkpointer.save(tmp_path, SMALL)).tensors == 1
            await checkpointer.prepare(SMALL)

    trio.run(main)


def test_endless_deadlines(opened: Opened, tmp_path: Path) -> None:
    checkpointer = opened(**dict.fromkeys(("save_deadline", "guard_deadline", "worker_start_deadline"), float("inf")))
    parameter = torch.nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.SGD([parameter])
    checkpointer.guard(optimizer)
    handle = checkpointer.save(tmp_path, {"w": parameter})
    optimizer.step()
    handle.result(LONG)


def test_the_process_of_a_dropped_one_ends_after_its_saves(tmp_path: Path, closing: Callable[[int], int]) -> None:
    checkpointer = AsyncCheckpointer(process=True)
    engine = checkpointer._engine
    worker = closing(os.pidfd_open(worker_of(checkpointer).pid))
    handles = [checkpointer.save(tmp_path / str(number), state(number)) for number in range(3)]
    with pytest.warns(ResourceWarning, match="unclosed"):
        del checkpointer
        gc.collect()
    for handle in handles:
        handle.result(LONG)
    assert has_ended(worker)
    engine.close(LONG)
