"""The channel between two stages: a queue bounded in bytes, first in first out.

Modelled on anyio's memory object streams (closed with ``with``) and on torchsnapshot's byte budget: an item larger than
the bound passes alone when the channel is empty, and equal to the bound is allowed. All methods run on one event loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

import anyio

T = TypeVar("T")


@dataclass(frozen=True)
class ChannelStatistics:
    """What a channel holds and has held."""

    items: int
    """Items sent and not yet received."""
    bytes: int
    """Their bytes."""
    peak_bytes: int
    """The most bytes that were held at once."""
    max_bytes: int
    """The bound."""
    waiting_senders: int
    """Tasks that wait for room."""
    waiting_receivers: int
    """Tasks that wait for an item."""


class Channel(Generic[T]):
    """Carries items with their sizes. ``with channel:`` in the sending stage closes it at the end, also on an error."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = self._peak = 0
        self._closed = False
        self._senders: deque[anyio.Event] = deque()
        self._receivers: deque[anyio.Event] = deque()

    async def send(self, item: T, nbytes: int) -> None:
        """Waits for room, behind earlier senders. Raises ``anyio.ClosedResourceError`` on a closed channel.

        Cancelled while it waits, the item is not sent and its turn passes to the next.
        """
        await self._turn(
            self._senders, lambda: self._closed or not self._items or self._bytes + nbytes <= self._max_bytes
        )
        if self._closed:
            raise anyio.ClosedResourceError
        self._items.append((item, nbytes))
        self._bytes += nbytes
        self._peak = max(self._peak, self._bytes)
        self._wake()

    async def receive(self) -> T:
        """The oldest item. Raises ``anyio.EndOfStream`` once the channel is closed and empty. A cancelled wait takes
        none.
        """
        await self._turn(self._receivers, lambda: bool(self._items) or self._closed)
        if not self._items:
            raise anyio.EndOfStream
        item, nbytes = self._items.popleft()
        self._bytes -= nbytes
        self._wake()
        return item

    def close(self) -> None:
        """No more items; what was sent can still be received. Safe to call twice."""
        self._closed = True
        self._wake()

    def drop(self) -> None:
        """Closed, and what was sent is let go of: nobody receives any more."""
        self._items.clear()
        self._bytes = 0
        self.close()

    def __enter__(self) -> Channel[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> Channel[T]:
        return self

    async def __anext__(self) -> T:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    def statistics(self) -> ChannelStatistics:
        """A snapshot."""
        return ChannelStatistics(
            len(self._items), self._bytes, self._peak, self._max_bytes, len(self._senders), len(self._receivers)
        )

    async def _turn(self, queue: deque[anyio.Event], ready: Callable[[], bool]) -> None:
        """Waits until the caller is first in ``queue`` and ``ready``; no await lies between that and the return."""
        if not queue and ready():
            return
        event = anyio.Event()
        queue.append(event)
        try:
            while not (queue[0] is event and ready()):
                await event.wait()
                if not (queue[0] is event and ready()):
                    queue[queue.index(event)] = event = anyio.Event()
        finally:
            queue.remove(event)
            self._wake()

    def _wake(self) -> None:
        for queue in (self._senders, self._receivers):
            if queue:
                queue[0].set()
