"""Saves and loads for a while on a slow disk that fills up and is freed, with little memory and a clock that jumps.

Nothing may grow: descriptors, threads, memory. A save may fail while the disk is full, and then says so; every load
finds the last save that did not.
"""

from __future__ import annotations

import errno
import gc
import os
import random
import resource
import tempfile
import threading
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
_RSS_GROWTH: Final = 64 << 20


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
    """What this process uses."""

    descriptors: int
    threads: int
    rss: int

    @classmethod
    def now(cls) -> Usage:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(len(os.listdir("/proc/self/fd")), threading.active_count(), pages * resource.getpagesize())


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

    def run(self, seconds: float) -> None:
        """Raises ``Lost`` for what is not found, and for what has grown."""
        try:
            with little_memory():
                for _ in range(50):  # the allocator keeps a share for each thread; it is full after some forty
                    self._round(full=self._rng.random() < 0.1)
                before, end = Usage.now(), time.monotonic() + seconds
                while time.monotonic() < end:
                    self._round(full=self._rng.random() < 0.1)
                after = Usage.now()
        finally:
            for checkpointer, _ in self._places.values():
                checkpointer.close()
        self._figures.update(rss_growth=after.rss - before.rss)
        if after.descriptors > before.descriptors + 2 or after.threads > before.threads + 2:
            raise Lost(f"it leaks: {before} at first, {after} at the end")
        if after.rss > before.rss + _RSS_GROWTH:
            raise Lost(f"it grows: {before} at first, {after} at the end")

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
