"""One side of a transfer between two ranks: what ``wire.py`` says, on a link; failures named by rank and tensor; and
whose turn it is, since between two ranks and in one direction there is one transfer at a time, in the order of the
calls.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import cached_property
from typing import Final, TypeAlias, TypeVar, TypeVarTuple

import anyio
import torch
from torch import Tensor

from asyncdcp.errors import Cancelled, PeerError, PeerFailed
from asyncdcp.threads import on_thread
from asyncdcp.transport import wire
from asyncdcp.transport.link import Link, LinkError, Pending
from asyncdcp.transport.wire import Failure, Message, Tick
from asyncdcp.unwinding import ungrouped
from asyncdcp.worker.failures import from_frame

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_TAG: Final = 0xADC0
"""What the sender of a state says has this tag, what the receiver says the next one: two transfers between the same
ranks, one each way, do not mix."""
_SHOWN: Final = 3

Names: TypeAlias = Callable[[], Sequence[str]]
"""Asked only where there is an error to name them."""


class Endpoint:
    """The link to ``peer``, from the ``sender`` of the state or its receiver. A wait ends by ``timeout`` seconds."""

    def __init__(self, link: Link, peer: int, timeout: float, *, sender: bool) -> None:
        self.peer = peer
        self.timeout = timeout
        self.device = link.device
        self._link = link
        self._out, self._in = (_TAG, _TAG + 1) if sender else (_TAG + 1, _TAG)
        self._given_up = False

    @cached_property
    def _limiter(self) -> anyio.CapacityLimiter:
        """Made at its first use: that is on the engine's loop; this is made on the caller's, maybe trio's."""
        return anyio.CapacityLimiter(1)

    async def call(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Calls the function on a thread."""
        return await on_thread(self._limiter, function, *args)

    async def call_long(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """As ``call``, for what waits again and again: cancelled, it ends after the wait that it is at."""
        watching, over = anyio.CancelScope(), False  # a scope of its own: a group's cancelled task holds itself

        async def watch() -> None:
            with watching:
                try:
                    await anyio.sleep_forever()
                finally:
                    self._given_up = not over

        with ungrouped():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch)
                result = await self.call(function, *args)
                over = True
                watching.cancel()
        return result

    # ── blocking, on threads ──

    def send(self, data: Tensor, what: str, tensors: Names = tuple) -> Pending:
        """Begins to send; ``what`` ("sending") and the names of ``tensors`` are for errors."""
        try:
            return self._link.send(self.peer, self._out, data)
        except LinkError as error:
            raise self._failed(error, what, tensors) from error

    def receive(self, into: Tensor, what: str, tensors: Names = tuple) -> Pending:
        """Begins to receive."""
        try:
            return self._link.receive(self.peer, self._in, into)
        except LinkError as error:
            raise self._failed(error, what, tensors) from error

    def wait(self, pending: Pending, what: str, tensors: Names = tuple) -> None:
        """``PeerFailed`` with rank and tensors if it fails, or nothing happens in time."""
        if self._given_up:
            raise Cancelled("the transfer was given up when its transport closed")
        try:
            pending.wait(self.timeout)
        except LinkError as error:
            raise self._failed(error, what, tensors) from error

    def send_bytes(self, data: bytes, what: str, tensors: Names = tuple) -> Pending:
        """As ``send``; the bytes are copied."""
        return self.send(torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device), what, tensors)

    def say_all(self, message: Sequence[bytes], what: str) -> None:
        """Sends an encoded message."""
        for pending in [self.send_bytes(part, what) for part in message]:
            self.wait(pending, what)

    def hear_one(self, what: str) -> Message:
        """Receives a message."""
        head = wire.decode_head(self._receive_bytes(wire.HEAD_BYTES, what), self.peer)
        return wire.decode(head, self._receive_bytes(head.length, what), self.peer)

    def _receive_bytes(self, length: int, what: str) -> bytes:
        into = torch.empty(length, dtype=torch.uint8, device=self.device)
        self.wait(self.receive(into, what), what)
        return bytes_of(into)

    def post_tick(self, tensors: Names) -> tuple[Pending, Tensor]:
        """Begins to receive a tick, behind ``tensors``."""
        into = torch.empty(wire.TICK_BYTES, dtype=torch.uint8, device=self.device)
        return self.receive(into, "receiving", tensors), into

    def take_tick(self, posted: tuple[Pending, Tensor], number: int, tensors: Names) -> Tick:
        """Waits for a tick."""
        self.wait(posted[0], "receiving", tensors)
        return wire.decode_tick(bytes_of(posted[1]), number, self.peer)

    def send_taken(self, number: int, tensors: Names) -> None:
        """Says that batch ``number``, of ``tensors``, is not needed any more where it is shared."""
        self.wait(self.send_bytes(wire.encode_taken(number), "receiving", tensors), "receiving", tensors)

    def post_taken(self, tensors: Names) -> tuple[Pending, Tensor]:
        """Begins to receive that."""
        into = torch.empty(wire.TAKEN_BYTES, dtype=torch.uint8, device=self.device)
        return self.receive(into, "sending", tensors), into

    def wait_taken(self, posted: tuple[Pending, Tensor], number: int, tensors: Names) -> None:
        """Waits until batch ``number``, of ``tensors``, is taken."""
        self.wait(posted[0], "sending", tensors)
        wire.check_taken(bytes_of(posted[1]), number, self.peer)

    def _failed(self, error: LinkError, what: str, tensors: Names) -> PeerFailed:
        names = tensors()
        what = f"{what} {named(names)}" if names else what
        said = f"did nothing for {self.timeout:g} s (timeout=)" if error.late else f"is gone ({error})"
        return PeerFailed(
            f"{what}: rank {self.peer} {said}. The process group may not be usable any more; make a new one, and a new "
            "transport",
            rank=self.peer,
            tensors=names,
        )

    # ── on the loop ──

    async def say(self, message: Message, what: str) -> None:
        """Sends a message."""
        await self.call(self.say_all, wire.encode(message), what)

    async def hear(self, kind: type[T], what: str) -> T:
        """The next message, which must be of this kind. ``PeerFailed`` with the peer's own error if it gave up."""
        message = await self.call(self.hear_one, what)
        if isinstance(message, Failure):
            cause = from_frame(message.error)
            raise PeerFailed(f"rank {self.peer} failed: {cause}", rank=self.peer, tensors=cause.tensors) from cause
        if not isinstance(message, kind):
            raise PeerError(f"rank {self.peer} said {type(message).__name__}, and {kind.__name__} was due")
        return message


def bytes_of(buffer: Tensor) -> bytes:
    """A small buffer's content, wherever it is."""
    return buffer.cpu().numpy().tobytes()


def named(tensors: Sequence[str]) -> str:
    """The first few names, for a message."""
    rest = len(tensors) - _SHOWN
    return ", ".join(tensors[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


class Turns:
    """Transfers take turns: between two ranks and in one direction there is one at a time. Lives on one loop."""

    def __init__(self) -> None:
        self._queues: dict[tuple[str, int], deque[anyio.Event]] = defaultdict(deque)
        """Who is at it with a rank, and who waits: for each the event that it is over."""

    @asynccontextmanager
    async def of(self, direction: str, ranks: Iterable[int]) -> AsyncIterator[None]:
        """The turn with all of ``ranks``. The place in all queues is taken at once, so nobody waits in a circle, and
        nobody overtakes one that still waits for another rank.
        """
        over, queues = anyio.Event(), [self._queues[direction, rank] for rank in ranks]
        for queue in queues:
            queue.append(over)
        try:
            for queue in queues:
                while (first := queue[0]) is not over:
                    await first.wait()
            yield
        finally:
            for queue in queues:
                queue.remove(over)
            over.set()
