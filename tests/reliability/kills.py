"""SIGKILL for the trainer, for its background process or for both, at any moment; what they said before is the oracle.

What was said to be saved must be there; what was staged, too, if its worker lived on; nothing that was never begun; and
every byte of it right. The same place is used again by the next trainer, with all that the last one left there.
"""

from __future__ import annotations

import asyncio
import os
import random
import select
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from asyncdcp.storage import LocalStorage
from tests.reliability.power import Figures
from tests.reliability.trainer import fork_trainer
from tests.reliability.worlds import Lost, version_at

FOLDER: Path | None = None
_SECONDS: Final = 60.0
"""The longest that a process may take to come to its end."""
_GENERATIONS: Final = 10
"""How many trainers use a place, one after another."""


def run(cases: int, seed: int, figures: Figures) -> None:
    """Kills so many. Half of the places are on tmpfs, where there is one."""
    rng = random.Random(seed)
    for number in range(0, cases, _GENERATIONS):
        shared = Path("/dev/shm")
        memory = FOLDER is None and number // _GENERATIONS % 2 and shared.is_dir()
        with tempfile.TemporaryDirectory(dir=shared if memory else FOLDER) as folder:
            kind = "tmpfs" if memory else "disk"
            version = 0
            for _ in range(min(_GENERATIONS, cases - number)):
                version = kill_one(Path(folder) / "place", version, rng, figures)
                figures.update([kind])


class Heard:
    """What a trainer has said."""

    def __init__(self) -> None:
        self.last = dict.fromkeys(("worker", "begun", "staged", "saved", "failed"), 0)
        self._rest = b""

    def hear(self, data: bytes) -> None:
        """Takes what came through the pipe."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            word, _, number = line.decode().partition(" ")
            self.last[word] = int(number)


def kill_one(path: Path, before: int, rng: random.Random, figures: Figures) -> int:
    """One trainer and its end; the version that is there then. ``before`` is the version that was."""
    trainer, listen = fork_trainer(path, before + 1)
    heard = Heard()
    try:
        _listen_until(heard, listen, lambda: heard.last["begun"] > before)
        if rng.random() < 0.3:
            _listen_until(heard, listen, lambda: heard.last["saved"] > before)
        _listen_for(heard, listen, rng.choice((0.001, 0.01, 0.05)) * rng.random() * 3)
        victim = rng.choice(("trainer", "worker", "both"))
        with _watched(heard.last["worker"]) as worker:
            _kill(victim, trainer, heard.last["worker"], rng)
            others: list[int] = []
            if victim == "worker":  # the trainer goes on with another, and dies in its turn
                _listen_for(heard, listen, rng.random() * 0.1)
                others = _kill_parent(trainer)
            os.waitpid(trainer, 0)
            _wait_for_end(worker)
        _listen_for(heard, listen, 0)
        for other in others:
            with _watched(other) as last:
                _wait_for_end(last)
    finally:
        os.close(listen)
    acknowledged = heard.last["saved"] > before
    figures.update({"kills": 1, f"of {victim}": 1, "after a save was acknowledged": int(acknowledged)})
    return _check(path, before, heard, worker_lived=victim == "trainer")


def _check(path: Path, before: int, heard: Heard, *, worker_lived: bool) -> int:
    found, last = version_in_child(path), heard.last
    least = max(before, last["saved"], last["staged"] if worker_lived and last["failed"] < last["staged"] else 0)
    if not least <= found <= max(before, last["begun"]):
        raise Lost(f"found version {found}, not at least {least}; the trainer said {last}, and {before} was there")
    return found


def _kill(victim: str, trainer: int, worker: int, rng: random.Random) -> None:
    order = {"trainer": [trainer], "worker": [worker], "both": [trainer, worker]}[victim]
    if rng.random() < 0.5:
        order.reverse()
    for pid in order:
        with suppress(ProcessLookupError):  # a worker whose trainer has died before it
            os.kill(pid, signal.SIGKILL)


def _kill_parent(pid: int) -> list[int]:
    """Its children, which it may not have named yet: it is stopped before it is killed, if it has not ended."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    os.kill(pid, signal.SIGKILL)
    return children


@contextmanager
def _watched(pid: int) -> Iterator[int]:
    """A pidfd, -1 if it has ended already."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield -1
        return
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def _wait_for_end(pidfd: int) -> None:
    if pidfd >= 0 and not select.select([pidfd], [], [], _SECONDS)[0]:
        raise Lost(f"the background process did not end within {_SECONDS:g} s")


def _listen_until(heard: Heard, listen: int, done: Callable[[], bool]) -> None:
    end = time.monotonic() + _SECONDS
    while not done():
        if time.monotonic() > end:
            raise Lost(f"nothing was begun, or saved, within {_SECONDS:g} s: {heard.last}")
        _listen_for(heard, listen, 0.01, once=True)


def _listen_for(heard: Heard, listen: int, seconds: float, *, once: bool = False) -> None:
    """Hears what is said within so many seconds, and what was said before."""
    end = time.monotonic() + seconds
    while True:
        left = max(0.0, end - time.monotonic())
        if not select.select([listen], [], [], left)[0]:
            return
        data = os.read(listen, 65536)
        if not data:
            return
        heard.hear(data)
        if once:
            return


def version_in_child(path: Path) -> int:
    """``version_at`` in a process of its own, so that this one has no threads when it forks; a mix ends it with 255."""
    answer, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 255
        try:
            os.write(tell, str(asyncio.run(version_at(LocalStorage(path)))).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(tell)
    _, status = os.waitpid(pid, 0)
    said = os.read(answer, 100)
    os.close(answer)
    if status != 0:
        raise Lost(f"what is at {path} could not be loaded, or is a mix of two states")
    return int(said)
