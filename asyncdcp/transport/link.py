"""The seam between a transfer and what carries its bytes: sends and receives of one buffer each, in order.

A link between two ranks is a pair of queues for each tag: the n-th ``receive`` takes what the n-th ``send`` gives, and
both name the same number of bytes. Calls return at once; what they return is waited for, on a thread.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any, Final, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from asyncdcp.errors import InvalidOption

_POLL_SECONDS: Final = 0.0005


class LinkError(Exception):
    """The link to a peer failed, for good. ``late``: it did nothing for as long as was waited; else it is gone."""

    def __init__(self, message: str, *, late: bool = False) -> None:
        super().__init__(message)
        self.late = late


class Pending(Protocol):
    """A send or receive under way. It keeps its buffer alive; nothing touches that after the last reference to it."""

    def wait(self, timeout: float) -> None:
        """Blocks until it is done; ``LinkError`` if it fails, or is not done in ``timeout`` seconds."""
        ...


class Link(Protocol):
    """Used by several threads at once, never for one peer and tag. Raises ``LinkError`` where a peer is gone."""

    rank: int
    world_size: int
    device: torch.device
    """Where its buffers are: contiguous tensors of dtype uint8, not empty."""
    may_share: bool
    """Whether blocks may go beside it where both processes can map the same memory. Its two directions are then used
    at a time, and what it does to the bytes it carries is not done to these."""

    def send(self, peer: int, tag: int, data: Tensor) -> Pending:
        """Begins to send; ``data`` is not changed until that is done."""
        ...

    def receive(self, peer: int, tag: int, into: Tensor) -> Pending:
        """Begins to receive exactly as many bytes as ``into`` has."""
        ...


class GroupLink:
    """A ``torch.distributed`` process group: ``send`` and ``recv`` of its own, no collectives.

    On gloo a wait that times out closes the group's connections to all peers: torch cannot take back what was begun.
    """

    def __init__(self, group: Any, device: torch.device | None) -> None:
        self.group = group
        self.rank = int(group.rank())
        self.world_size = int(group.size())
        self.device = _device_of(group) if device is None else _current(device)
        self.may_share = self.device.type == "cpu"
        if self.device.type == "meta":
            raise InvalidOption("device takes where the group's buffers are, such as 'cpu' or 'cuda:0', not 'meta'")

    def send(self, peer: int, tag: int, data: Tensor) -> Pending:
        """As ``Link``."""
        try:
            return _Work(self.group.send([data], peer, tag), data)
        except RuntimeError as error:  # torch's DistBackendError and its kin
            raise LinkError(_first_line(error)) from error

    def receive(self, peer: int, tag: int, into: Tensor) -> Pending:
        """As ``Link``."""
        try:
            return _Work(self.group.recv([into], peer, tag), into)
        except RuntimeError as error:
            raise LinkError(_first_line(error)) from error


class _Work:
    def __init__(self, work: Any, buffer: Tensor) -> None:
        self._work = work
        self._buffer = buffer

    def wait(self, timeout: float) -> None:
        until = time.monotonic() + timeout
        try:
            self._work.wait(timedelta(seconds=timeout))
        except RuntimeError as error:
            late = time.monotonic() >= until or "imed out" in str(error)
            raise LinkError(_first_line(error), late=late) from error
        if not self._buffer.is_cpu:  # there a wait is only that of the current stream
            self._wait_on_host(until)

    def _wait_on_host(self, until: float) -> None:
        event = torch.accelerator.current_stream(self._buffer.device).record_event()
        while not event.query():
            if time.monotonic() >= until:
                raise LinkError("the device did not finish it", late=True)
            time.sleep(_POLL_SECONDS)


def _device_of(group: Any) -> torch.device:
    """Where the group's backend wants its buffers: on the host, if it takes them there."""
    kinds = {torch.device(kind).type for kind in getattr(group, "_device_types", ())}
    return torch.device("cpu") if not kinds or "cpu" in kinds else _current(torch.device(kinds.pop()))


def _current(device: torch.device) -> torch.device:
    """With its index: that of the calling thread, since on the transport's own threads another one is current."""
    if str(device) != device.type or device.type in ("cpu", "meta"):  # torch says that an index is never None
        return device
    if not torch.accelerator.is_available():
        raise InvalidOption(f"device takes where the group's buffers are, and there is no {device.type} here")
    return torch.device(device.type, torch.accelerator.current_device_index())


def group_link(group: Any, device: torch.device | str | None) -> GroupLink:
    """The link of ``group``, None being torch's default group. ``InvalidOption`` where there is none, or not for this
    process.
    """
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            raise InvalidOption("PGTransport takes a process group, and there is no default one yet")
        group = dist.group.WORLD
    if not callable(getattr(group, "send", None)) or not callable(getattr(group, "rank", None)):
        raise InvalidOption(f"PGTransport takes a process group of which this process is a member, not {group!r}")
    return GroupLink(group, None if device is None else torch.device(device))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
