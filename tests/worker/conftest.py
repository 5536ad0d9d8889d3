"""Checkpointers with a background process, and waits for the end of processes: by pidfd, never by sleeping."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncdcp import AsyncCheckpointer, Options
from asyncdcp.worker.pipeline import ProcessPipeline
from asyncdcp.worker.process import CheckpointProcess

LONG = 150.0  # a deadline that only a failing test reaches: a cold cache makes importing torch take half a minute
SLAB = 8 << 20


def state(number: int, slabs: int = 3) -> dict[str, Any]:
    """A state of about ``slabs`` slabs that is unlike that of any other number."""
    return {"w": torch.full((slabs * SLAB // 8 - 5000,), number, dtype=torch.int64), "number": number}


def has_ended(pidfd: int, seconds: float = LONG) -> bool:
    """Whether the process has ended, waiting for it."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def worker_of(checkpointer: AsyncCheckpointer) -> CheckpointProcess:
    """The checkpointer's process now; it must have one."""
    pipeline = checkpointer._lanes.pipeline
    assert isinstance(pipeline, ProcessPipeline)
    made = checkpointer._engine.submit(pipeline.acquire).result(LONG)
    assert isinstance(made, CheckpointProcess)
    return made


Opened = Callable[..., AsyncCheckpointer]
ROOM = 1 << 30


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A new folder, in memory where there is room: who is killed loses nothing of either, and no sync takes its time.
    ``tests/reliability`` kills on a disk.
    """
    if not os.path.isdir("/dev/shm") or shutil.disk_usage("/dev/shm").free < ROOM:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Makes checkpointers with a background process by their options, and closes them."""
    with ExitStack() as stack:

        def make(**options: Any) -> AsyncCheckpointer:
            made = AsyncCheckpointer(Options(**options), process=True)
            stack.callback(made.close)
            return made

        yield make


class Trainers:
    """Trainers that may be killed: forked from one process that has imported torch, so that each costs little."""

    def __init__(self) -> None:
        program = Path(__file__).with_name("trainer.py")
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        self._process = subprocess.Popen(
            [sys.executable, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
        )

    def begin(self, **order: Any) -> int:
        """Starts a trainer that has an idle worker; returns a pidfd of that worker."""
        self._say(order)
        self.worker = int(self._hear()["worker"])
        return os.pidfd_open(self.worker)

    def go(self) -> dict[str, Any]:
        """Lets it carry out its order; what it said until it ended, with the signal that ended it."""
        self._say({})
        said: dict[str, Any] = {}
        while "signal" not in said:
            said |= self._hear()
        return said

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(LONG)
        self._process.stdout.close()

    def _say(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the trainers' process has ended"
        heard: dict[str, Any] = json.loads(line)
        return heard


@pytest.fixture(scope="module")
def trainers() -> Iterator[Trainers]:
    made = Trainers()
    yield made
    made.close()


@pytest.fixture
def closing() -> Iterator[Callable[[int], int]]:
    """Closes descriptors at the end."""
    fds: list[int] = []

    def add(fd: int) -> int:
        fds.append(fd)
        return fd

    yield add
    for fd in fds:
        with suppress(OSError):
            os.close(fd)
