"""Copies from accelerators: after everything the caller has enqueued, beside everything it enqueues next.

A ``DeviceFence`` is taken on the caller's thread when ``save`` is called: an event on the current stream of every
device that holds a source. The copies run on a side stream per device that waits for the event first, so they see the
tensors as they were at the call, whatever stream the copying thread would use by itself. Chosen by
``torch.accelerator``; without one, nothing here does anything.

Lifetimes: sources are held by the save until every copy has arrived; what a copy needs in between is allocated and
freed on its side stream, so that nothing else gets that memory before; slots of the arena and bounce buffers are given
on only after the stream was waited for, whatever went wrong. A capture of a CUDA graph must not *begin* while a save is
being staged either: call ``wait_staged()`` before it.

Untested so far, for want of a device: all of this module. ``tests/staging/test_accelerator.py`` runs where there is
one. Meant for devices that have streams as CUDA's are (cuda, xpu).
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

_logger = logging.getLogger("asyncdcp")
_HOST = ("cpu", "meta")


class DeviceFence:
    """The point in every device's work up to which a save sees its tensors."""

    def __init__(self, sources: Iterable[Tensor]) -> None:
        devices = {tensor.device for tensor in sources if not tensor.is_cpu and tensor.device.type not in _HOST}
        for device in devices:
            _refuse_capture(device)
        self._events: dict[torch.device, Any] = {
            device: torch.accelerator.current_stream(device).record_event() for device in devices
        }

    @property
    def devices(self) -> frozenset[torch.device]:
        """The devices that hold a source."""
        return frozenset(self._events)

    def wait_on(self, device: torch.device, stream: Any) -> None:
        """Makes ``stream`` wait; the host does not."""
        stream.wait_event(self._events[device])


class DeviceCopies:
    """Side streams for the copies of one save. Used by one thread; several threads each have their own."""

    def __init__(self, fence: DeviceFence) -> None:
        self._fence = fence
        self._streams: dict[torch.device, Any] = {}

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Device and side stream are current in the block; what is enqueued there runs after the fence."""
        if device.type in _HOST:
            yield
            return
        module = torch.get_device_module(device)
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = module.Stream(device)
            self._fence.wait_on(device, stream)
        with module.stream(stream):
            yield

    def finish(self) -> None:
        """Waits on the host until every copy has arrived; the sources must be held until then."""
        for stream in self._streams.values():
            stream.synchronize()


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
        with torch.cuda.device(device):
            return int(runtime.cudaHostRegister(address, nbytes, _PORTABLE))

    # A failure stays with the thread as CUDA's last error, which torch would raise at that thread's next kernel.
    with ThreadPoolExecutor(1) as once:
        code = once.submit(register).result()
    if code != 0:
        _logger.warning("the staging arena could not be pinned (cudaHostRegister: %d); copies are slower", code)
        return None

    def unregister() -> None:
        with torch.cuda.device(device):
            runtime.cudaHostUnregister(address)

    return unregister


def _refuse_capture(device: torch.device) -> None:
    """While a CUDA graph is being captured no other work may be enqueued, and captured copies would be replayed."""
    if device.type != "cuda":
        return
    with torch.cuda.device(device):
        capturing = torch.cuda.is_current_stream_capturing()
    if capturing:
        raise UsageError("save() was called while a CUDA graph is being captured; call it before or after the capture")
