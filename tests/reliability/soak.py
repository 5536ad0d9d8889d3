"""Saves and loads for a while on a slow disk that fills up and is freed, with little memory and a clock that jumps.

Nothing may grow, here or in the background process: descriptors, threads, memory. A save may fail while the disk is
full, and then says so; every load finds the last save that did not.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple
from unittest.mock import patch

from asyncdcp.errors import StorageFull
from asyncdcp.storage import LocalStorage
from asyncdcp.storage.posix import OS
from tests.reliability.power import Figures
from tests.reliability.worlds import Lost

FOLDER: Path | None = None
ELEMENTS: Final = 3_000_000
_HEADROOM: Final = 2 << 30
"""Bytes of address space that are left to use. The C library reserves 64 MiB for a thread, up to eight a core."""
_GROWTH: Final = 8 << 20
"""Bytes by which a process may be larger at the end. A leak of 1 MiB in ten saves is past it after eighty."""
_M_MMAP_THRESHOLD: Final = -3
_MAPPED: Final = 1 << 20


class RoughDisk(OS):
    """The real system, with a disk that is slow at times, and full until ``full_until`` (of ``time.monotonic``)."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.full_until = 0.0

    def _endure(self, path: str = "") -> None:
        if self._rng.random() < 0.02:
            time.sleep(self._rng.random() * 0.05)
        if time.monotonic() < self.full_until:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def pwrite(self, fd: int, buffer: memoryview, offset: int, /) -> int:
        self._endure()
        return super().pwrite(fd, buffer, offset)

    def fallocate(self, fd: int, length: int, /) -> None:
        self._endure()
        super().fallocate(fd, length)

    def link(self, source: str, target: str, /) -> None:
        self._endure(target)
        super().link(source, target)


class Usage(NamedTuple):
    """What a process uses."""

    descriptors: int
    threads: int
    rss: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        process = Path(f"/proc/{pid}")
        pages = int((process / "statm").read_text().split()[1])
        descriptors, threads = (len(os.listdir(process / each)) for each in ("fd", "task"))
        return cls(descriptors, threads, pages * resource.getpagesize())


class Both(NamedTuple):
    """What the trainer and its background process use."""

    trainer: Usage
    worker: Usage
    worker_pid: int

    @classmethod
    def now(cls, worker_pid: int) -> Both:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return cls(Usage.of(os.getpid()), Usage.of(worker_pid), worker_pid)

    def check(self, before: Both) -> None:
        """Raises ``Lost`` for what is more than it was ``before``."""
        if self.worker_pid != before.worker_pid:
            raise Lost(f"the background process is another one: {before.worker_pid} at first, {self.worker_pid} now")
        for name in ("trainer", "worker"):
            then, now = getattr(before, name), getattr(self, name)
            if now.descriptors > then.descriptors + 2 or now.threads > then.threads + 2:
                raise Lost(f"the {name} leaks: {then} at first, {now} at the end")
            if now.rss > then.rss + _GROWTH:
                raise Lost(f"the {name} grows: {then} at first, {now} at the end")


def give_back() -> None:
    """From now on freed memory goes back to the system, so that what is resident is what is in use.

    By itself the C library keeps what is freed, once something of that size was freed before, in a pool for each thread
    that allocated; and there it does not use again what was aligned, as tensors are (glibc's bug 14581). The tensors
    that loads make, on several threads, so come to hundreds of MiB that are all free, and level off within a minute.
    """
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED)


@contextmanager
def little_memory() -> Iterator[None]:
    """Address space is limited to what is used now and a little more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _HEADROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def run(cases: int, seed: int, figures: Figures) -> None:
    """For ``cases`` seconds, on the thread pipeline and in the background process in turn."""
    rng, real = random.Random(seed), time.time
    clock = patch("time.time", lambda: real() + rng.choice((0, 0, 3600, -86400)))
    give_back()
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder, clock:
        Soak(Path(folder), seed, figures).run(cases)


class Soak:
    """Two checkpointers, a place for each, and what was last saved there."""

    def __init__(self, folder: Path, seed: int, figures: Figures) -> None:
        import torch  # the other runs do without it

        from asyncdcp import AsyncCheckpointer

        self._disk = RoughDisk(seed)
        self._rng = random.Random(seed)
        self._figures = figures
        self._tensor = torch.zeros(ELEMENTS)
        self._places = {
            "thread": (AsyncCheckpointer(process=False), LocalStorage(folder / "thread", posix=self._disk)),
            "process": (AsyncCheckpointer(), LocalStorage(folder / "process")),
        }
        self._saved = dict.fromkeys(self._places, 0)

    def run(self, seconds: float, *, warm_up: int = 50) -> None:
        """Raises ``Lost`` for what is not found, and for what has grown since the first ``warm_up`` rounds."""
        try:
            with little_memory():
                for _ in range(warm_up):
                    self._round(full=self._rng.random() < 0.1)
                before, end, over = self._usage(), time.monotonic() + seconds, False
                while not over:  # one round at least
                    over = time.monotonic() >= end
                    self._round(full=self._rng.random() < 0.1)
                after = self._usage()
        finally:
            for checkpointer, _ in self._places.values():
                checkpointer.close()
        self._figures.update(
            trainer_growth=after.trainer.rss - before.trainer.rss, worker_growth=after.worker.rss - before.worker.rss
        )
        after.check(before)

    def _usage(self) -> Both:
        from tests.reliability.saves import worker_of

        return Both.now(worker_of(self._places["process"][0]).pid)

    def _round(self, *, full: bool) -> None:
        for kind, (checkpointer, storage) in self._places.items():
            step = self._saved[kind] + 1
            self._tensor.fill_(step)
            if full and kind == "thread":
                self._disk.full_until = time.monotonic() + 0.05
            try:
                checkpointer.save(storage, {"w": self._tensor, "step": step}, overwrite=True).result(60)
            except StorageFull:
                if not full:
                    raise
                self._figures.update(full=1)
                time.sleep(max(0.0, self._disk.full_until - time.monotonic()))
            else:
                self._saved[kind] = step
                self._figures.update(saves=1)
            self._load(kind)

    def _load(self, kind: str) -> None:
        checkpointer, storage = self._places[kind]
        found = checkpointer.load(storage).result(60)
        self._figures.update(loads=1)
        if found["step"] != self._saved[kind] or not bool((found["w"] == found["step"]).all()):
            raise Lost(f"loaded step {found['step']}, and {self._saved[kind]} was the last to be saved ({kind})")
