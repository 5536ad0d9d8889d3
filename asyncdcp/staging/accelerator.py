"""Copies from accelerators: after everything the caller has enqueued, beside everything it enqueues next.

A ``DeviceFence`` is taken on the caller's thread when ``save`` is called: a mark on the current stream of every device
that holds a source. The copies run on a side stream per device that waits for the mark first, so they see the tensors
as they were at the call, whatever stream the copying thread would use by itself. Slabs are enqueued as far ahead as
there are slots, so that a guarded step soon waits for a mark on the side streams in place of the host.

Lifetimes: sources are held by the save until every copy has arrived; what a copy needs in between is allocated and
freed on its side stream, so that nothing else gets that memory before; slots of the arena and bounce buffers are given
on only after the copies into them were waited for, whatever went wrong.

CUDA graphs: a ``save`` on a stream that is being captured is refused. A capture that begins while a save is being
staged is not invalidated by it: every call is made from a thread in the relaxed capture mode
(``devices.beside_captures``). A step within a capture waits on the host, since a graph cannot wait for what is outside
of it; and a replay runs no hook at all, so ``wait_staged()`` has to come before one that changes what is being saved.

Untested so far, for want of a device: what calls the device itself (``devices.StreamWork``). Their order is tested with
fakes; ``tests/staging/test_accelerator.py`` has tests that run where there is a device.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from asyncdcp.errors import UsageError
from asyncdcp.staging import devices
from asyncdcp.staging.devices import DeviceWork

_logger = logging.getLogger("asyncdcp")

Marks = list[tuple[DeviceWork, Any]]
"""Points in the work of devices."""


class DeviceFence:
    """The point in every device's work up to which a save sees its tensors."""

    def __init__(self, sources: Iterable[Tensor]) -> None:
        found = {tensor.device for tensor in sources if not devices.is_on_host(tensor)}
        self.work = {device: devices.work_on(device) for device in found}
        if any(work.capturing() for work in self.work.values()):
            # No other work may be enqueued then, and captured copies would be replayed.
            raise UsageError(
                "save() was called while a CUDA graph is being captured; call it before or after the capture"
            )
        self.marks = {device: work.mark() for device, work in self.work.items()}

    @property
    def devices(self) -> frozenset[torch.device]:
        """The devices that hold a source."""
        return frozenset(self.work)


class DeviceCopies:
    """A side stream for each device, for all copies of one save. Thread-safe."""

    def __init__(self, fence: DeviceFence) -> None:
        self._fence = fence
        self._streams: dict[torch.device, Any] = {}
        self._lock = threading.Lock()

    @contextmanager
    def on(self, device: torch.device) -> Iterator[bool]:
        """Device and side stream are current in the block, and what is enqueued there runs after the fence. Yields
        whether copies from there need not be waited for at once.
        """
        work = self._fence.work.get(device)
        if work is None:
            yield False
            return
        with work.on(self._stream(device, work)):
            yield work.asynchronous

    def _stream(self, device: torch.device, work: DeviceWork) -> Any:
        with self._lock:
            if device not in self._streams:
                stream = work.side_stream()
                with work.on(stream):
                    work.wait(self._fence.marks[device])
                self._streams[device] = stream
            return self._streams[device]

    def marks(self) -> Marks:
        """Where everything enqueued so far will have arrived."""
        with self._lock:
            streams = list(self._streams.items())
        marks: Marks = []
        for device, stream in streams:
            work = self._fence.work[device]
            with work.on(stream):
                marks.append((work, work.mark()))
        return marks

    def finish(self) -> None:
        """Waits on the host until every copy has arrived; the sources must be held until then."""
        wait_on_host(self.marks())


def wait_on_host(marks: Marks) -> None:
    """Blocks until all are reached."""
    for work, mark in marks:
        work.wait_on_host(mark)


class BounceBuffers:
    """Pinned memory of one slab for each thread that copies, where the arena itself could not be pinned.

    A slab is put together there, at the link's speed, and then moved to its slot by the host.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    @contextmanager
    def around(self, slot: Tensor, length: int) -> Iterator[Tensor]:
        """Where to copy to; all must have arrived when the block ends, and ``length`` bytes go to ``slot`` then."""
        with self._lock:
            buffer = self._free.pop() if self._free else None
        if buffer is None:  # torch keeps freed pinned memory for the next save
            with devices.beside_captures():
                buffer = torch.empty(self._nbytes, dtype=torch.uint8, pin_memory=True)
        try:
            yield buffer
            ctypes.memmove(slot.data_ptr(), buffer.data_ptr(), length)
        finally:
            with self._lock:
                self._free.append(buffer)


_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of the process


def register_host_memory(address: int, nbytes: int, device: torch.device) -> Callable[[], None] | None:
    """Pins memory that is there already, so that copies to it run at the link's speed and beside the computation.

    Returns what undoes it, or None where that cannot be had. The calls are made with ``device`` current, lest they
    start up another one that this process does not use.
    """
    if device.type != "cuda":
        return None
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch does not annotate it

    def register() -> int:
        with devices.beside_captures(), torch.cuda.device(device):
            return int(runtime.cudaHostRegister(address, nbytes, _PORTABLE))

    # A failure stays with the thread as CUDA's last error, which torch would raise at that thread's next kernel.
    with ThreadPoolExecutor(1) as once:
        code = once.submit(register).result()
    if code != 0:
        _logger.warning("the staging arena could not be pinned (cudaHostRegister: %d); copies are slower", code)
        return None

    def unregister() -> None:
        with devices.beside_captures(), torch.cuda.device(device):
            runtime.cudaHostUnregister(address)

    return unregister
