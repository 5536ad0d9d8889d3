"""Copies from accelerators: after everything the caller has enqueued, beside everything it enqueues next.

A ``DeviceFence`` is taken on the caller's thread when ``save`` is called: an event on the current stream of every
device that holds a source. The copies run on a side stream per device that waits for the event first, so they see the
tensors as they were at the call, whatever stream the copying thread would use by itself. Chosen by
``torch.accelerator``; without one, nothing here does anything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
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


def register_host_memory(address: int, nbytes: int) -> Callable[[], None] | None:
    """Pins memory that is there already, so that copies to it run at the link's speed and beside the computation.

    Returns what undoes it, or None where that cannot be had: copies then go through the driver's own pinned buffers and
    hold up the copying thread.
    """
    if not torch.cuda.is_available():
        return None
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch does not annotate it
    code = runtime.cudaHostRegister(address, nbytes, 0)
    if int(code) != 0:
        _logger.warning("the staging arena could not be pinned (cudaHostRegister: %s); copies are slower", code)
        return None
    return lambda: runtime.cudaHostUnregister(address)


def _refuse_capture(device: torch.device) -> None:
    """While a CUDA graph is being captured no other work may be enqueued, and captured copies would be replayed."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UsageError("save() was called while a CUDA graph is being captured; call it before or after the capture")
