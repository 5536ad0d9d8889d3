"""A link between ranks that are threads of one process: for tests, of this package and of programs that use it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable

import torch
from torch import Tensor

from asyncdcp.transport.link import LinkError, Pending


class MemoryHub:
    """Connects ``world_size`` ranks. As on a process group a send waits for its receive, and copies straight into it.
    ``may_share`` lets blocks go beside it, by shared memory, as between processes of one host.

    ``lose(rank)`` is the death of a rank: whatever is, or comes to be, under way with it fails everywhere. ``tamper``,
    if set, is called with sender, receiver and each buffer after it has arrived, and may change it.
    """

    def __init__(self, world_size: int, *, may_share: bool = False) -> None:
        self.world_size = world_size
        self.may_share = may_share
        self.moved = 0
        """Buffers that have arrived so far."""
        self.tamper: Callable[[int, int, Tensor], None] | None = None
        self._condition = threading.Condition()
        self._sends: dict[tuple[int, int, int], deque[_Half]] = defaultdict(deque)
        self._receives: dict[tuple[int, int, int], deque[_Half]] = defaultdict(deque)
        self._lost: set[int] = set()

    def link(self, rank: int) -> MemoryLink:
        """The end of one rank."""
        return MemoryLink(self, rank)

    def lose(self, rank: int) -> None:
        """The rank dies."""
        with self._condition:
            self._lost.add(rank)
            self._condition.notify_all()

    def _begin(self, key: tuple[int, int, int], half: _Half, *, sends: bool) -> None:
        own, other = (self._sends, self._receives) if sends else (self._receives, self._sends)
        with self._condition:
            if self._is_lost(key):
                raise LinkError("connection reset by peer")
            if not other[key]:
                own[key].append(half)
                return
            match = other[key].popleft()
            data, into = (half.buffer, match.buffer) if sends else (match.buffer, half.buffer)
            if data.nbytes != into.nbytes:
                raise LinkError(f"{data.nbytes} bytes were sent where {into.nbytes} are received")
            into.copy_(data)
            if self.tamper is not None:
                self.tamper(key[0], key[1], into)
            self.moved += 1
            half.done = match.done = True
            self._condition.notify_all()

    def _wait(self, key: tuple[int, int, int], half: _Half, timeout: float) -> None:
        until = time.monotonic() + timeout
        with self._condition:
            while not half.done:
                if self._is_lost(key):
                    raise LinkError("connection reset by peer")
                if not self._condition.wait(max(until - time.monotonic(), 0)) and not half.done:
                    raise LinkError("timed out", late=True)

    def _is_lost(self, key: tuple[int, int, int]) -> bool:
        return key[0] in self._lost or key[1] in self._lost


class _Half:
    """One side of a buffer's way."""

    def __init__(self, hub: MemoryHub, key: tuple[int, int, int], buffer: Tensor, *, sends: bool) -> None:
        self.buffer = buffer
        self.done = False
        self._hub = hub
        self._key = key
        hub._begin(key, self, sends=sends)

    def wait(self, timeout: float) -> None:
        self._hub._wait(self._key, self, timeout)


class MemoryLink:
    """As ``Link``."""

    device = torch.device("cpu")

    def __init__(self, hub: MemoryHub, rank: int) -> None:
        self._hub = hub
        self.rank = rank
        self.world_size = hub.world_size
        self.may_share = hub.may_share

    def send(self, peer: int, tag: int, data: Tensor) -> Pending:
        """As ``Link``."""
        return _Half(self._hub, (self.rank, peer, tag), data, sends=True)

    def receive(self, peer: int, tag: int, into: Tensor) -> Pending:
        """As ``Link``."""
        return _Half(self._hub, (peer, self.rank, tag), into, sends=False)
