"""One receive: the offer, agreement, the stream, verification, the state. See ``wire.py`` for the order."""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asyncdcp.engine import Engine
from asyncdcp.errors import AsyncDCPError, Cancelled, ChecksumMismatch, PeerError, PeerFailed
from asyncdcp.futures import CheckpointFuture
from asyncdcp.results import frozen
from asyncdcp.trace import Trace
from asyncdcp.transport import wire
from asyncdcp.transport.binding import Anew, InPlace
from asyncdcp.transport.blocks import checksum_of
from asyncdcp.transport.endpoint import Endpoint, named
from asyncdcp.transport.landing import Landing
from asyncdcp.transport.link import Link, Pending
from asyncdcp.transport.offered import LayoutCache, Offered
from asyncdcp.transport.reports import ReceiveReport
from asyncdcp.transport.turns import Turns
from asyncdcp.transport.wire import Accept, Done, Failure, Offer, Verdict
from asyncdcp.worker.failures import to_frame

_TOUCHED = ". The state may be partly written: receive or load it again"


class _Arriving(NamedTuple):
    """A block under way: to where, and whether that is a tensor's own memory."""

    block: int
    pending: Pending
    into: Tensor
    in_place: bool


class ReceiveTask:
    """Carries one receive out on the engine's loop. ``future`` is resolved here and nowhere else."""

    def __init__(
        self, engine: Engine, link: Link, src: int, timeout: float, into: Anew | InPlace, layouts: LayoutCache
    ) -> None:
        self._layouts = layouts
        self._end = Endpoint(link, src, timeout, sender=False)
        self._link = link
        self._into = into
        self._error: AsyncDCPError | None = None
        self._offered: Offered | None = None
        self._landing: Landing | None = None
        self._buffers: dict[tuple[int, int], Tensor] = {}
        self._digests: list[tuple[int, ...]] = []
        self._found: list[tuple[int, ...]] = []
        self._landed = self._last_in_place = 0
        self.trace = Trace()
        self.future: CheckpointFuture[Any] = engine.future(f"receive from rank {src}", cancel=self.cancel)

    def cancel(self) -> None:
        """Gives the receive up. What is on its way is still taken, and thrown away."""
        self._error = self._error or Cancelled(f"the {self.future.name} was cancelled{self._touched()}")
        if self._landing is None:
            self.future.fail(self._error)

    async def run(self, turns: Turns) -> None:
        """Never raises but for cancellation, at the engine's end."""
        try:
            async with turns.of("from", [self._end.peer]):
                state = await self._receive()
        except AsyncDCPError as error:
            self.future.fail(self._error or error)
        except Exception as error:  # noqa: BLE001  # it belongs to whoever awaits the future
            known = AsyncDCPError(f"the {self.future.name} failed: {type(error).__name__}: {error}{self._touched()}")
            known.__cause__ = error
            self.future.fail(known)
        else:
            self.future.resolve(state)
        finally:
            self._buffers.clear()
            self.future.fail(Cancelled(f"the {self.future.name} was given up when its transport closed"))

    def _failure(self) -> AsyncDCPError | None:
        return self._error

    def _touched(self) -> str:
        return _TOUCHED if self._landing is not None and isinstance(self._into, InPlace) else ""

    async def _receive(self) -> Any:
        if self._error is not None:
            raise self._error
        end = self._end
        offer = await end.hear(Offer, "waiting for the offer of a state")
        begun = time.monotonic()
        try:
            landing, tensors = await end.call(self._agree, offer)
        except AsyncDCPError as error:
            await end.say(Failure(to_frame(error, with_traceback=False)), "refusing the state")
            raise
        await end.say(Accept(self._link.rank), "accepting the state")
        assert self._offered is not None
        self._landing = landing
        await self._stream(self._offered)
        if (failure := self._failure()) is not None:
            await end.say(Failure(to_frame(failure, with_traceback=False)), "telling that the transfer failed")
            raise failure
        total = self._offered.layout.total
        await end.say(Done(total), "telling that the state has arrived")
        with self.trace.span("restore"):
            state = await end.call(self._into.finish)
        seconds, stages = time.monotonic() - begun, frozen(self.trace.seconds())
        self.future.report = ReceiveReport(end.peer, tensors, total, self._landed, seconds, stages)
        return state

    def _agree(self, offer: Offer) -> tuple[Landing, int]:
        """Everything is matched before a byte of the state comes. Whatever is wrong, the sender is told."""
        if self._error is not None:
            raise self._error
        try:
            if offer.rank != self._end.peer:
                raise PeerError(f"rank {self._end.peer} calls itself {offer.rank}; are the groups the same?")
            with self.trace.span("match"):
                self._offered = self._layouts.read(offer)
                targets = self._into.bind(self._offered)
                self.trace.total = self._offered.layout.total
                return Landing(self._offered, targets, self._link.device), len(targets)
        except AsyncDCPError:
            raise
        except Exception as error:
            raise AsyncDCPError(f"the state cannot be received: {type(error).__name__}: {error}") from error

    # ── the stream ──

    async def _stream(self, offered: Offered) -> None:
        """Takes all batches. Returns at the end, or when this side has failed; ``PeerFailed`` when the other has."""
        batches = wire.batches(offered.layout.borders[1:])
        if await self._end.call_long(self._take_all, batches):
            await self._hear_why()
        if self._error is None and offered.checksums:
            self._verify(offered, batches)

    def _take_all(self, batches: list[range]) -> bool:
        """Ticks and batches as they come, on a thread: whether the sender has stopped. Two batches are under way."""
        ticks = deque(self._end.post_tick() for _ in range(2))
        arriving: deque[tuple[int, list[_Arriving]]] = deque()
        stopped = False
        for number in range(1, len(batches) + 3):
            if arriving and arriving[0][0] == number - 2:
                self._take_batch(*arriving.popleft())
            behind = partial(self._names_of, batches, number - 2)
            tick = self._end.take_tick(ticks.popleft(), number, behind)
            self._digests.append(tick.digests)
            stopped = stopped or tick.verdict is Verdict.STOP
            if not stopped and number <= len(batches):
                arriving.append((number, self._post(number, batches[number - 1])))
                ticks.append(self._end.post_tick())
            if not ticks:
                break
        return stopped

    def _names_of(self, batches: list[range], number: int) -> list[str]:
        """The tensors of a batch, the first if there is no such number yet."""
        assert self._offered is not None
        blocks = batches[max(number, 1) - 1] if batches else ()
        return list(dict.fromkeys(name for block in blocks for name in self._offered.layout.tensors_in(block)))

    async def _hear_why(self) -> None:
        try:
            await self._end.hear(Failure, "waiting for the reason why the sender stopped")
        except PeerFailed as error:
            raise PeerFailed(f"{error}{self._touched()}", rank=error.rank, tensors=error.tensors) from error.__cause__

    def _post(self, number: int, batch: range) -> list[_Arriving]:
        return [self._post_block(number, place, block) for place, block in enumerate(batch)]

    def _post_block(self, number: int, place: int, block: int) -> _Arriving:
        assert self._offered is not None
        assert self._landing is not None
        begin, end = self._offered.layout.borders[block : block + 2]
        memory = self._landing.in_place(block) if self._error is None else None
        if memory is not None:
            self._last_in_place = number
        into = self._buffer(number, place, end - begin) if memory is None else memory
        names = partial(self._offered.layout.tensors_in, block)
        return _Arriving(block, self._end.receive(into, "receiving", names), into, memory is not None)

    def _buffer(self, number: int, place: int, length: int) -> Tensor:
        key = (number % 2, place)
        found = self._buffers.get(key)
        if found is None or len(found) < length:
            found = self._buffers[key] = torch.empty(length, dtype=torch.uint8, device=self._link.device)
        return found[:length]

    def _take_batch(self, number: int, arriving: list[_Arriving]) -> None:
        """Waits for the blocks in order, hashes and delivers them."""
        try:
            self._found.append(tuple(self._take_block(each) for each in arriving))
        except (PeerError, Cancelled):
            raise
        except Exception as error:  # noqa: BLE001  # what fails here, fails the transfer in order
            known = AsyncDCPError(f"a tensor could not be filled: {type(error).__name__}: {error}{_TOUCHED}")
            known.__cause__ = error
            self._error = self._error or known
        if self._error is not None and number >= self._last_in_place:
            self.future.fail(self._error)  # nothing is written any more

    def _take_block(self, each: _Arriving) -> int:
        assert self._offered is not None
        assert self._landing is not None
        self._end.wait(each.pending, "receiving", partial(self._offered.layout.tensors_in, each.block))
        if self._error is not None:
            return 0
        with self.trace.span("receive", len(each.into)):
            digest = checksum_of(each.into) if self._offered.checksums else 0
            if each.in_place:
                self._landed += len(each.into)
            else:
                self._landing.deliver(each.block, each.into)
        return digest

    def _verify(self, offered: Offered, batches: list[range]) -> None:
        for batch, found, told in zip(batches, self._found, self._digests[2:], strict=True):
            for block, ours, theirs in zip(batch, found, told, strict=False):
                if ours != theirs:
                    names = offered.layout.tensors_in(block)
                    self._error = ChecksumMismatch(
                        f"block {block} from rank {offered.rank} does not match its checksum; it holds {named(names)}. "
                        f"It was changed while it was sent, or damaged on its way{self._touched()}",
                        path=f"rank {offered.rank}",
                        block=block,
                        tensors=names,
                    )
                    return
