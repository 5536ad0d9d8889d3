"""The n-th call of a save fails, in every way a system has, for n = 1, 2, … until a save is through without a fault."""

from __future__ import annotations

import errno
import os
import threading
from typing import Any, Final

from asyncdcp.errors import AsyncDCPError, CommitUnknown
from asyncdcp.testing.disk import SimulatedDisk
from tests.reliability.power import Figures
from tests.reliability.simulation import simulated
from tests.reliability.worlds import ENDLESS, Call, Lost, World, check
from tests.virtual import run

FAULTS: Final = ("EIO", "ENOSPC", "EDQUOT", "EINTR", "EROFS", "ETIMEDOUT", "short", "MemoryError")
_HOPELESS: Final = 200


class Fault:
    """Interceptor: the ``number``-th call of a ``Posix`` fails; ``happened`` says which. All later ones too if
    ``sticky``.
    """

    def __init__(self, kind: str, number: int, *, sticky: bool = False) -> None:
        self.happened = ""
        self._kind = kind
        self._left = number
        self._sticky = sticky
        self._lock = threading.Lock()

    @property
    def of_directory(self) -> bool:
        """Whether it was a sync of a directory."""
        return (
            self.happened.startswith("fsync")
            and not self.happened.endswith("safetensors")
            and ".json" not in self.happened
        )

    def __call__(self, call: Call) -> Any:
        with self._lock:
            self._left -= 1
            passes = self._left > 0 or (self._left < 0 and not self._sticky)
        if passes:
            return call()
        self.happened = self.happened or f"{call.operation} {call.path}"
        if call.operation == "close":
            call()  # the number is given up whatever the system answers
        if self._kind == "short":
            return self._short(call)
        if call.operation == "fsync":
            disk: SimulatedDisk = call.real.__self__  # type: ignore[attr-defined]  # a bound method
            disk.fail_sync(call.args[0])
        if self._kind == "MemoryError":
            raise MemoryError
        number = getattr(errno, self._kind)
        raise OSError(number, os.strerror(number), call.path)

    def _short(self, call: Call) -> Any:
        """Half of what was to be written or read; other calls are as ever."""
        if call.operation == "pwrite":
            fd, data, offset = call.args
            return call.real(fd, data[: max(1, len(data) // 2 - 7)], offset)
        if call.operation == "preadv":
            fd, buffers, offset, flags = call.args
            return call.real(fd, [buffers[0][: max(1, len(buffers[0]) // 2)]], offset, flags)
        return call() if call.operation != "close" else None


def sweep(kind: str, *, ranks: int = 1, sticky: bool = False, step: int = 1, figures: Figures | None = None) -> int:
    """All n (or each ``step``-th) for one kind of fault; returns the first that is past the end. Raises ``Lost`` with
    what replays it.
    """
    for number in range(1, _HOPELESS, step):
        fault = Fault(kind, number, sticky=sticky)
        try:
            with simulated():
                run(one(fault, ranks))
        except AssertionError as error:
            raise Lost(f"{kind}, call {number} ({fault.happened}), {ranks} ranks, sticky={sticky}: {error}") from error
        if figures is not None:
            figures.update(faults=1)
        if not fault.happened:
            return number
    raise Lost("there is no end of calls")


async def one(fault: Fault, ranks: int) -> None:
    """Saves, saves over that with the fault, and saves again without. Nothing is lost, nothing stays open."""
    world = World(ranks=ranks)
    await world.save()
    world.intercept = fault
    errors = await world.try_to_save([ENDLESS] * ranks)
    world.intercept = None
    assert all(error is None or isinstance(error, AsyncDCPError) for error in errors), f"not of ours: {errors}"
    if fault.of_directory and any(isinstance(error, CommitUnknown) for error in errors):
        world.expected |= {1}  # one rank says that it does not know; another's sync has succeeded since
    assert not world.disk.open_files, f"left open: {world.disk.open_files}"
    world.limit = 12
    world.lose_power("the end", "/")
    world.limit = 0
    await world.resume()
    for loss in world.losses:
        await check(loss)
    await world.save()
    if not fault.of_directory:  # whose filesystem has lost names that are seen: what it does next nobody can say
        world.limit = 12
        world.lose_power("the next save", "/")
        await check(world.losses[-1])
