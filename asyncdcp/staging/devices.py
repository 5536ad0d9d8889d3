"""What staging asks of one device: marks in its work, a side stream, waits. The seam that tests put fakes in.

Devices whose module has streams as CUDA's are (cuda, xpu) copy beside the computation. On others (mps) the host waits:
for everything enqueued when ``save`` is called, and for each copy as it is made.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, Protocol

import torch
from torch import Tensor


class DeviceWork(Protocol):
    """The work of one device. Marks and streams are its own objects; the calling thread's current stream counts."""

    asynchronous: bool
    """Whether copies from it may still be on their way when the call that makes them returns."""

    def capturing(self) -> bool:
        """Whether the current stream is captured in a graph."""
        ...

    def mark(self) -> Any:
        """Marks what has been enqueued on the current stream so far."""
        ...

    def wait(self, mark: Any) -> None:
        """What is enqueued on the current stream from now on runs after ``mark``; the host goes on."""
        ...

    def wait_on_host(self, mark: Any) -> None:
        """Blocks until ``mark`` is reached."""
        ...

    def side_stream(self) -> Any:
        """A stream that runs beside the current one."""
        ...

    def on(self, stream: Any) -> AbstractContextManager[object]:
        """Device and ``stream`` are current in the block."""
        ...


class StreamWork:
    """A device with streams. None of its calls breaks a capture that is under way on another thread."""

    asynchronous = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)

    def capturing(self) -> bool:
        if self._device.type != "cuda":
            return False
        with torch.cuda.device(self._device):
            return torch.cuda.is_current_stream_capturing()

    def mark(self) -> Any:
        with beside_captures():
            return torch.accelerator.current_stream(self._device).record_event()

    def wait(self, mark: Any) -> None:
        torch.accelerator.current_stream(self._device).wait_event(mark)

    def wait_on_host(self, mark: Any) -> None:
        with beside_captures():
            mark.synchronize()

    def side_stream(self) -> Any:
        with beside_captures():
            return self._module.Stream(self._device)

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        with beside_captures(), self._module.stream(stream):
            yield


class BlockingWork:
    """A device whose streams torch does not show: the host waits wherever a stream would."""

    asynchronous = False

    def __init__(self, device: torch.device) -> None:
        self._synchronize: Callable[[], object] = getattr(torch.get_device_module(device), "synchronize", lambda: None)

    def capturing(self) -> bool:
        return False

    def mark(self) -> None:
        self._synchronize()

    def wait(self, mark: Any) -> None:
        pass

    def wait_on_host(self, mark: Any) -> None:
        pass

    def side_stream(self) -> None:
        return None

    def on(self, stream: Any) -> AbstractContextManager[object]:
        return nullcontext()


def is_on_host(tensor: Tensor) -> bool:
    """Whether there is nothing to wait for."""
    return tensor.is_cpu or tensor.is_meta


def work_on(device: torch.device) -> DeviceWork:
    """The seam for a device."""
    module = torch.get_device_module(device)
    has_streams = hasattr(module, "Stream") and hasattr(module, "stream")
    return StreamWork(device) if has_streams else BlockingWork(device)


# ── captures ────────────────────────────────────────────────────────────────────────────────────────────────────────

_RELAXED: Final = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@contextmanager
def beside_captures() -> Iterator[None]:
    """While another thread captures a CUDA graph in the global mode, which is torch's default, a call that CUDA deems
    unsafe there invalidates the capture, whichever thread makes it (to ask for an event, to allocate). Not so from a
    thread that is in the relaxed mode, as this one is in the block. Source: cuThreadExchangeStreamCaptureMode in the
    CUDA driver's reference. Where the driver's library is not to be had (ROCm), nothing is done.
    """
    used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch does not annotate it
    exchange = _exchange() if used else None
    mode = ctypes.c_int(_RELAXED)
    if exchange is None or exchange(ctypes.byref(mode)) != 0:
        yield
        return
    try:  # the call has put the mode before in the place of the new one
        yield
    finally:
        exchange(ctypes.byref(mode))


@functools.cache
def _exchange() -> Callable[[Any], int] | None:
    try:
        found: Callable[[Any], int] = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return None
    return found
