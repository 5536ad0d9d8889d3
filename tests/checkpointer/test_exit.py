"""The end: interpreter exit without close, forks, leaks, and a checkpointer that is dropped."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from asyncdcp import AsyncCheckpointer
from asyncdcp.errors import Closed, StorageError
from asyncdcp.names import record_save_id
from tests.work import LONG, open_descriptors

Python = Callable[..., "CompletedProcess[str]"]
SMALL = {"w": torch.arange(10)}

PROGRAM = """
    import sys, torch
    from asyncdcp import AsyncCheckpointer, Options
    checkpointer = AsyncCheckpointer(process=False)
    handle = checkpointer.save("it", {"w": torch.arange(3_000_000)})
"""


def committed(folder: Path) -> bool:
    return any(record_save_id(path.name) for path in folder.iterdir())


@pytest.mark.parametrize(
    ("end", "code"),
    [("", 0), ("raise ValueError('of the program')", 1), ("del checkpointer, handle", 0)],
)
def test_what_is_pending_is_committed_at_exit(python: Python, tmp_path: Path, end: str, code: int) -> None:
    ran = python(PROGRAM + f"    {end}\n")
    assert ran.returncode == code, ran.stderr
    assert committed(tmp_path / "it")
    expected = "of the program" if end.startswith("raise") else "unclosed" if end.startswith("del") else ""
    assert (expected in ran.stderr) if end.startswith("raise") else (ran.stderr == ""), ran.stderr


def test_with_warnings_as_errors_the_exit_is_the_same(python: Python, tmp_path: Path) -> None:
    ran = python(PROGRAM, "ResourceWarning")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert committed(tmp_path / "it")


def test_an_unseen_failure_is_said_at_exit(python: Python) -> None:
    ran = python("""
        import torch
        from asyncdcp import AsyncCheckpointer
        open("it", "w").close()  # a file where the directory would be
        AsyncCheckpointer(process=False).save("it", {"w": torch.arange(3)}).committed.wait()
    """)
    assert ran.returncode == 0
    assert "nobody looked at it" in ran.stderr


def test_a_close_that_was_interrupted_is_called_again_at_exit(python: Python) -> None:
    ran = python("""
        import asyncio, os, signal, torch
        from asyncdcp import AsyncCheckpointer, MemoryStorage

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored

        class Late(MemoryStorage):
            async def barrier(self):
                while not checkpointer._closed:
                    await asyncio.sleep(0.01)
                os.kill(os.getpid(), signal.SIGINT)  # the main thread is in close
                while not interrupted:
                    await asyncio.sleep(0.01)
                raise OSError(5, "the disk is gone")

        interrupted = False
        checkpointer = AsyncCheckpointer(process=False)
        try:
            checkpointer.save(Late(), {"w": torch.arange(3)})
            checkpointer.close()
        except KeyboardInterrupt:
            interrupted = True
    """)
    assert ran.returncode == 0
    assert "the disk is gone" in ran.stderr
    assert "nobody looked at it" in ran.stderr


def test_a_stuck_storage_does_not_hold_the_exit(python: Python) -> None:
    ran = python("""
        import threading, torch
        from anyio import to_thread
        from asyncdcp import AsyncCheckpointer, MemoryStorage, Options
        class Stuck(MemoryStorage):
            async def claim(self, name, data):
                await to_thread.run_sync(threading.Event().wait)
        checkpointer = AsyncCheckpointer(Options(close_deadline=0.1, settle_seconds=0.1), process=False)
        checkpointer.save(Stuck("the stuck place"), {"w": torch.arange(3)}).staged.result()
    """)
    assert ran.returncode == 0
    assert "the stuck place" in ran.stderr


# ── fork ──


def in_child(check: Callable[[], object]) -> int:
    """The exit code of a forked child that runs ``check``: 0 where it raises nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: threads are there, which is the point
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(120)  # a deadlock ends the child
            check()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_is_refused_and_closes_nothing(
    checkpointer: AsyncCheckpointer, faulty: Any, tmp_path: Path
) -> None:
    storage = faulty()
    gate = storage.gate("write")
    handle = checkpointer.save(storage, SMALL)
    gate.wait_begun()

    def check() -> None:
        calls: list[Callable[[], object]] = [
            lambda: checkpointer.save(tmp_path / "it", SMALL),
            lambda: checkpointer.load(tmp_path / "it"),
            lambda: checkpointer.prepare(SMALL),
            handle.cancel,
            handle.result,
        ]
        for call in calls:
            with pytest.raises(Closed, match="fork"):
                call()
        checkpointer.close()

    with checkpointer._lock, checkpointer._pending._lock:  # as if another thread had been in a verb
        assert in_child(check) == 0
    gate.release.set()
    assert handle.result().tensors == 1


def test_a_child_has_checkpointers_of_its_own(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
    checkpointer.save(tmp_path / "parent", SMALL).result()

    def check() -> None:
        with AsyncCheckpointer(process=False) as own:
            own.save(tmp_path / "child", SMALL).result()
            assert torch.equal(own.load(tmp_path / "child").result()["w"], SMALL["w"])

    assert in_child(check) == 0
    assert committed(tmp_path / "child")


# ── leaks ──


def mappings() -> set[str]:
    return {line for line in Path("/proc/self/maps").read_text().splitlines() if "asyncdcp-arena" in line}


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < until
        threading.Event().wait(0.001)


def test_close_leaves_no_thread_no_descriptor_and_no_memory(tmp_path: Path) -> None:
    before, threads, maps = open_descriptors(), set(threading.enumerate()), mappings()
    with AsyncCheckpointer(process=False) as checkpointer:
        for number in range(3):
            handle = checkpointer.save(tmp_path / str(number), {"w": torch.zeros(1_000_000 * (number + 1))})
        handle.result()
        checkpointer.load(tmp_path / "0").result()
        assert mappings() - maps
        checkpointer.save(tmp_path / "last", SMALL)
    wait_until(lambda: set(threading.enumerate()) <= threads)
    assert open_descriptors() <= before and mappings() <= maps  # those of other tests may have gone meanwhile


def test_one_that_was_never_used_needs_no_close() -> None:
    threads = set(threading.enumerate())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpointer = AsyncCheckpointer(process=False)
        del checkpointer
        gc.collect()
        AsyncCheckpointer(process=False).close()
    assert set(threading.enumerate()) <= threads  # those of other tests may have ended meanwhile


def test_a_dropped_one_warns_its_saves_end_and_its_failures_are_logged(
    faulty: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = mappings()
    failed, stuck, behind = faulty("failed"), faulty("stuck"), faulty("behind")
    for storage in (failed, behind):
        storage.errors["write", 1] = StorageError("broken")
    gate = stuck.gate("write")
    checkpointer = AsyncCheckpointer(process=False)
    engine = checkpointer._engine
    checkpointer.save(failed, SMALL).committed.wait()
    with pytest.warns(ResourceWarning, match="unclosed"):
        del checkpointer
        gc.collect()
    checkpointer = AsyncCheckpointer(process=False)
    other = checkpointer._engine
    held = checkpointer.save(stuck, SMALL)
    last = checkpointer.save(behind, SMALL)
    with pytest.warns(ResourceWarning, match="unclosed"):
        del checkpointer
        gc.collect()
    gate.release.set()
    assert held.result().tensors == 1
    last.committed.wait()
    for each in (engine, other):
        each.close(20)  # waits for callbacks
    for name in ("failed", "behind"):
        assert f"a save to {name} failed and nobody looked at it" in caplog.text
    wait_until(lambda: mappings() <= before)  # a thread that has told its result may have its arguments for a moment
