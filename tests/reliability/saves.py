"""The n-th call of a whole save fails, n = 1, 2, …: through ``AsyncCheckpointer``, as a user has it, arena and threads
and background process with it. ``errors`` does the same below that, and loses power after it.
"""

from __future__ import annotations

import errno
import gc
import os
import random
import threading
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from asyncdcp import AsyncCheckpointer
from asyncdcp.errors import AsyncDCPError, CommitUnknown, StorageError
from asyncdcp.storage import LocalStorage, Storage
from asyncdcp.storage.faults import FaultyStorage
from asyncdcp.storage.spec import Fault as WorkerFault
from asyncdcp.testing.disk import SimulatedDisk
from asyncdcp.worker.pipeline import ProcessPipeline
from asyncdcp.worker.process import CheckpointProcess
from tests.reliability.errors import Fault
from tests.reliability.power import Figures
from tests.reliability.worlds import PLACE, Lost, Process

SECONDS: Final = 60.0
"""More than a save of this size takes; who waits longer hangs."""
WORKER_FAULTS: Final = ("EIO", "ENOSPC", "EDQUOT", "EROFS", "ETIMEDOUT")
_HOPELESS: Final = 200


def state(version: int) -> dict[str, Any]:
    """Every element depends on the version."""
    return {"w": torch.arange(5000) * 17 + version, "v": torch.tensor([version]), "version": version}


class Held(NamedTuple):
    """What this process holds for its saves."""

    descriptors: int
    arenas: int

    @classmethod
    def now(cls) -> Held:
        maps = Path("/proc/self/maps").read_text()
        return cls(len(os.listdir("/proc/self/fd")), maps.count("asyncdcp-arena"))


class Saver:
    """A checkpointer and the versions that it saves to one place, each over the last, of which ``version`` is there."""

    def __init__(self, checkpointer: AsyncCheckpointer, storage: Storage, version: int = 0) -> None:
        self.checkpointer = checkpointer
        self.version = version
        self._storage = storage

    def save(self) -> None:
        """Of the next version; it is there then."""
        self.version += 1
        self.checkpointer.save(self._storage, state(self.version), overwrite=True).result(SECONDS)
        self.check({self.version})

    def try_to_save(self, storage: Storage) -> BaseException | None:
        """Of the next version, through a storage that fails; what the save raised. What is there fits to that."""
        before, self.version = self.version, self.version + 1
        handle = self.checkpointer.save(storage, state(self.version), overwrite=True)
        error = handle.exception(SECONDS)
        if not handle.staged.done():
            raise Lost("the save is over, and its staging is not")
        if error is not None and not isinstance(error, AsyncDCPError):
            raise Lost(f"not of ours: {error!r}")
        possible = {self.version} if error is None else {before}
        self.check(possible | {self.version} if isinstance(error, CommitUnknown) else possible)
        return error

    def check(self, possible: set[int]) -> None:
        """What a load finds, every element of it."""
        try:
            found = self.checkpointer.load(self._storage).result(SECONDS)
        except AsyncDCPError as error:
            raise Lost(f"a load fails: {error}") from error
        expected = state(found["version"])
        if found["version"] not in possible:
            raise Lost(f"found version {found['version']}, not one of {possible}")
        if not all(torch.equal(found[name], expected[name]) for name in ("w", "v")):
            raise Lost("a mix of two states was loaded")

    def is_idle(self) -> bool:
        """Whether its arena is nobody's, and every slot of it free."""
        arena = self.checkpointer._lanes.arenas._current
        return arena is not None and (arena.users, arena.ring.statistics().in_use) == (0, 0)


def check_named(error: BaseException, kind: str) -> None:
    """The error says what the system said: the number's text, or that there was no memory."""
    cause: BaseException | None = error
    told = "MemoryError" if kind == "MemoryError" else os.strerror(getattr(errno, kind))
    causes: list[str] = []
    while cause is not None:
        causes.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__
    if not any(told in text for text in causes) or (kind != "MemoryError" and not isinstance(error, StorageError)):
        raise Lost(f"the error does not say {told!r}: {causes}")


def sweep(kind: str, *, sticky: bool = False, figures: Figures | None = None) -> int:
    """Every n for one kind of fault, on the thread pipeline over a simulated disk, all by one checkpointer; returns the
    first n that is past the end. Raises ``Lost`` with what replays it.
    """
    disk, threads = SimulatedDisk(), set(threading.enumerate())
    with AsyncCheckpointer(process=False) as checkpointer:
        Saver(checkpointer, _storage(disk)).save()
        image, held = disk.image(), Held.now()
        for number in range(1, _HOPELESS):
            fault = Fault(kind, number, sticky=sticky)
            try:
                _one(checkpointer, SimulatedDisk(image), fault, kind)
            except AssertionError as error:
                raise Lost(f"{kind}, call {number} ({fault.happened}), sticky={sticky}: {error}") from error
            if figures is not None:
                figures.update(faults=1)
            if not fault.happened:
                break
        else:
            raise Lost("there is no end of calls")
        gc.collect()
        if any(now > then for now, then in zip(Held.now(), held, strict=True)):
            raise Lost(f"{kind}: it leaks: {held} at first, {Held.now()} at the end")
    for thread in set(threading.enumerate()) - threads:
        thread.join(SECONDS)  # told to end, they may still be at it
        if thread.is_alive():
            raise Lost(f"a thread is left: {thread}")
    return number


def _storage(disk: SimulatedDisk, fault: Fault | None = None) -> Storage:
    posix: Any = Process(disk, intercept=fault)
    return LocalStorage(PLACE, posix=posix)


def _one(checkpointer: AsyncCheckpointer, disk: SimulatedDisk, fault: Fault, kind: str) -> None:
    saver = Saver(checkpointer, _storage(disk), version=1)
    error = saver.try_to_save(_storage(disk, fault))
    if error is not None and kind != "short":
        check_named(error, kind)
    if disk.open_files:
        raise Lost(f"left open: {disk.open_files}")
    if not saver.is_idle():
        raise Lost("the arena is not free")
    saver.save()


def sweep_worker(folder: Path, cases: int, seed: int, figures: Figures | None = None) -> None:
    """Calls of the background process by sample, each failing in one way or another, on a real disk. It must be the
    same process at the end, and hold no more than at first.
    """
    rng = random.Random(seed)
    with AsyncCheckpointer(process=True) as checkpointer:
        saver = Saver(checkpointer, LocalStorage(folder))
        saver.save()
        before = _inspect(checkpointer)
        for _ in range(cases):
            kind, number, sticky = rng.choice(WORKER_FAULTS), rng.randrange(1, 60), rng.random() < 0.3
            fault = WorkerFault("any", number, "errno", getattr(errno, kind), sticky)
            try:
                error = saver.try_to_save(FaultyStorage(folder, [fault]))
                if error is not None:
                    check_named(error, kind)
                if not saver.is_idle():
                    raise Lost("the arena is not free")
                saver.save()
            except AssertionError as error:
                raise Lost(f"in the worker, {fault}, seed {seed}: {error}") from error
            if figures is not None:
                figures.update({"faults": 1, "in the worker": 1, "saves that failed": error is not None})
        after = _inspect(checkpointer)
    if after != before:
        raise Lost(f"the worker is another or holds more: {before} at first, {after} at the end")


def worker_of(checkpointer: AsyncCheckpointer) -> CheckpointProcess:
    """Its background process now."""
    pipeline = checkpointer._lanes.pipeline
    assert isinstance(pipeline, ProcessPipeline)
    worker = checkpointer._engine.submit(pipeline.acquire).result(SECONDS)
    assert isinstance(worker, CheckpointProcess)
    return worker


def _inspect(checkpointer: AsyncCheckpointer) -> tuple[int, int, int, int]:
    worker = worker_of(checkpointer)
    seen = checkpointer._engine.submit(worker.inspect).result(SECONDS)
    return worker.pid, seen.descriptors, seen.arenas, seen.saves
