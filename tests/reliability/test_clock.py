"""The wall clock jumps, by hours, both ways, at every look at it: nothing expires, nothing hangs, nothing is lost."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import anyio
import pytest
import torch

import asyncdcp
from asyncdcp import AsyncCheckpointer, CheckpointManager, LocalStorage, Options
from asyncdcp.errors import CheckpointNotFound, DeadlineExceeded
from asyncdcp.runs.layout import term_name
from asyncdcp.runs.settling import settle_saves
from asyncdcp.storage import LocalPlace
from asyncdcp.storage.faults import FaultyOS, FaultyStorage
from asyncdcp.storage.spec import Fault
from asyncdcp.worker import launch
from tests.reliability.saves import Saver

HOURS: Final = (0, 5, -3, 48, -48, 1)
LONG: Final = 60.0

_JUMPS = f"""
import itertools, time
real, hours = time.time, itertools.cycle({HOURS})
time.time = lambda: real() + 3600 * next(hours)
"""


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, and in every background process that it starts."""
    real, hours = time.time, itertools.cycle(HOURS)
    monkeypatch.setattr(time, "time", lambda: real() + 3600 * next(hours))
    monkeypatch.setattr(launch, "_BOOT", _JUMPS + launch._BOOT)


class Held(FaultyOS):
    """A disk whose first fsync takes until it is let go."""

    def __init__(self) -> None:
        super().__init__([])
        self.begun, self.go = threading.Event(), threading.Event()

    def fsync(self, fd: int, /) -> None:
        self.begun.set()
        self.go.wait(LONG)
        super().fsync(fd)


@pytest.fixture
def held() -> Iterator[Held]:
    disk = Held()
    yield disk
    disk.go.set()


# ── what looks at it ──

WRITTEN_DOWN: Final = {
    "manager/session.py": 1,  # in the history of a run
    "manager/telemetry.py": 1,  # the times of spans
    "pipeline/records.py": 1,  # in a Record
    "pipeline/settle.py": 1,  # in a Record
    "runs/settling.py": 1,  # in a Record
    "runs/writer.py": 1,  # in a term's claim
    "storage/memory.py": 1,  # when an object was changed
    "cli/commands/gc.py": 2,  # --older-than, which is of files
    "cli/commands/report.py": 1,  # when the report was made
}
"""The only places that ask for the wall clock, and what for: to write it down, not to wait by it."""

_LOOK: Final = re.compile(r"\b(?:time|datetime|date)\.(?:time|time_ns|now|utcnow|today)\(")


def test_deadlines_are_not_by_the_wall_clock() -> None:
    package = Path(asyncdcp.__file__).parent
    looks = {str(path.relative_to(package)): len(_LOOK.findall(path.read_text())) for path in package.rglob("*.py")}
    assert {path: count for path, count in looks.items() if count} == WRITTEN_DOWN


# ── saves and loads ──


@pytest.mark.usefixtures("jumping")
@pytest.mark.parametrize("process", [False, True], ids=["thread", "process"])
def test_saves_and_loads_go_on(tmp_path: Path, process: bool) -> None:
    """With deadlines shorter than any jump."""
    options = Options(save_deadline=50, settle_seconds=10, staging_bytes=8 << 20)
    with AsyncCheckpointer(options, process=process) as checkpointer:
        saver = Saver(checkpointer, LocalStorage(tmp_path))
        for _ in range(4):
            saver.save()
        deaf = FaultyStorage(tmp_path, [Fault("pwrite", 1, "errno", 5)])
        assert process == (saver.try_to_save(deaf) is not None)  # that has its faults only where it has travelled to
        saver.save()


@pytest.mark.usefixtures("jumping")
def test_a_slow_save_does_not_expire(tmp_path: Path, held: Held) -> None:
    with AsyncCheckpointer(Options(save_deadline=50), process=False) as checkpointer:
        handle = checkpointer.save(LocalStorage(tmp_path, posix=held), {"w": torch.ones(5)})
        assert held.begun.wait(LONG)
        assert not handle.committed.wait(0.2)
        held.go.set()
        handle.result(LONG)


@pytest.mark.usefixtures("jumping")
def test_a_stuck_save_expires(tmp_path: Path, held: Held) -> None:
    with AsyncCheckpointer(Options(save_deadline=0.2, settle_seconds=0.2), process=False) as checkpointer:
        handle = checkpointer.save(LocalStorage(tmp_path, posix=held), {"w": torch.ones(5)})
        error = handle.exception(LONG)
        held.go.set()
        assert isinstance(error, DeadlineExceeded | asyncdcp.errors.CommitUnknown)


@pytest.mark.usefixtures("jumping")
def test_a_loop_by_the_wall_clock_is_found(tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the loops' time taken from the wall clock, a slow save does expire."""
    monkeypatch.setattr(asyncio.BaseEventLoop, "time", lambda _self: time.time())
    with AsyncCheckpointer(Options(save_deadline=50, settle_seconds=1), process=False) as checkpointer:
        handle = checkpointer.save(LocalStorage(tmp_path, posix=held), {"w": torch.ones(5)})
        error = handle.exception(LONG)
        held.go.set()
        assert error is not None


# ── runs ──


@pytest.mark.usefixtures("jumping")
def test_a_run_goes_on_and_its_order_is_that_of_its_steps(tmp_path: Path) -> None:
    for begin in (0, 3):
        with CheckpointManager(tmp_path, process=False) as manager:
            state: dict[str, Any] = {"w": torch.zeros(3), "step": 0}
            restored = manager.restore_latest(state).result(LONG)
            assert (restored.step if restored else 0) == begin
            for step in range(begin + 1, begin + 4):
                manager.save(step, {"w": torch.full((3,), float(step)), "step": step}).result(LONG)
            assert manager.steps().result(LONG)[-1] == begin + 3


@pytest.mark.parametrize("hours", [5, -5], ids=["forward", "back"])
async def test_what_an_earlier_writer_left_is_given_up_in_time(tmp_path: Path, hours: int) -> None:
    """The storage's clock has jumped since it was written: back, so that its files are of the future, or forward. It
    takes no longer than ``quiet``; and whoever was only slow finds that it was given up.
    """
    place = LocalPlace(tmp_path)
    storage = place.child("step_1")
    writer = await storage.create(f"{'0' * 20}-0-0.safetensors", 0)
    await writer.finish(0)
    [file] = (tmp_path / "step_1").iterdir()
    then = time.time() - hours * 3600
    os.utime(file, (then, then))
    await place.storage.put(term_name(1), b"{}")
    begun, quiet = time.monotonic(), 0.3 if hours < 0 else LONG
    with anyio.fail_after(2 * LONG):
        settled = await settle_saves(place, 1, quiet=quiet, deadline=2 * LONG)
    assert len(settled.aborted) == 1
    assert (time.monotonic() - begun >= quiet) == (hours < 0)
    assert not await storage.claim(f"{'0' * 20}.json", b"late")
    with AsyncCheckpointer(process=False) as checkpointer, pytest.raises(CheckpointNotFound):
        checkpointer.load(tmp_path / "step_1").result(LONG)
