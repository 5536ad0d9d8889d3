"""One receive: the offer, agreement, the stream, verification, the state. See ``wire.py`` for the order."""

from __future__ import annotations

import time
from collections import deque
from copy import copy
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
from asyncdcp.transport.endpoint import Endpoint, Names, Turns, named
from asyncdcp.transport.handle import ReceiveReport
from asyncdcp.transport.landing import Landing
from asyncdcp.transport.link import Link, Pending
from asyncdcp.transport.offered import LayoutCache, Offered
from asyncdcp.transport.shared import SharedBlocks
from asyncdcp.transport.wire import Accept, Done, Failure, Offer, Verdict
from asyncdcp.unwinding import drop_frames
from asyncdcp.worker.failures import to_frame

_TOUCHED = ". The state may be partly written: receive or load it again"


class _Arriving(NamedTuple):
    """A block under way: to where, and whether that is a tensor's own memory. A shared one has arrived."""

    block: int
    pending: Pending | None
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
        self._buffers: dict[int, Tensor] = {}
        self._shared: SharedBlocks | None = None
        self._digests: list[tuple[int, ...]] = []
        self._found: list[tuple[int, ...]] = []
        self._landed = self._last_in_place = 0
        self.trace = Trace()
        self.future: CheckpointFuture[Any] = engine.future(f"receive from rank {src}", cancel=self.cancel)

    def cancel(self) -> None:
        """Gives the receive up. What is on its way, or still comes for it, is taken and thrown away."""
        self._error = self._error or Cancelled(f"the {self.future.name} was cancelled{self._touched()}")
        if self._landing is None:
            self._fail_early(self._error)

    def _fail_early(self, error: AsyncDCPError) -> None:
        """With one of its own: who has it may be in its frames when the other's are emptied."""
        told = copy(error)
        told.__cause__ = error.__cause__
        self.future.fail(told)

    async def run(self, turns: Turns) -> None:
        """Never raises but for cancellation, at the engine's end."""
        try:
            state = await self._in_turn(turns)
        except AsyncDCPError as error:
            drop_frames(error)
            self.future.fail(self._error or error)
        except Exception as error:  # noqa: BLE001  # it belongs to whoever awaits the future
            known = AsyncDCPError(f"the {self.future.name} failed: {type(error).__name__}: {error}{self._touched()}")
            known.__cause__ = error
            drop_frames(known)
            self.future.fail(known)
        else:
            self.future.resolve(state)
        finally:
            self.future.fail(Cancelled(f"the {self.future.name} was given up when its transport closed"))
            self._landing = None
            del self._into  # the state: who holds an error holds its traceback, and with that this frame

    async def _in_turn(self, turns: Turns) -> Any:
        try:
            async with turns.of("from", [self._end.peer]):
                return await self._receive()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Of all memory."""
        self._buffers.clear()
        if self._error is not None:
            drop_frames(self._error)
        if self._shared is not None:
            self._shared.close()

    def _failure(self) -> AsyncDCPError | None:
        return self._error

    def _touched(self) -> str:
        return _TOUCHED if self._landing is not None and isinstance(self._into, InPlace) else ""

    async def _receive(self) -> Any:
        end = self._end  # one that was cancelled before its turn hears its offer, too, lest the next one takes it
        offer = await end.hear(Offer, "waiting for the offer of a state")
        begun = time.monotonic()
        try:
            landing, tensors = await end.call(self._agree, offer)
        except AsyncDCPError as error:
            await end.say(Failure(to_frame(error, with_traceback=False)), "refusing the state")
            raise
        await end.say(Accept(self._link.rank, self._shared is not None), "accepting the state")
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
        shared = self._shared is not None
        self.future.report = ReceiveReport(end.peer, tensors, total, self._landed, shared, seconds, stages)
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
                if offer.shared is not None and getattr(self._link, "may_share", False):
                    self._shared = SharedBlocks.open(offer.shared, max(self._offered.layout.plan.blocks, default=0))
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
        """Ticks and batches as they come, on a thread: whether the sender has stopped."""

        def behind(number: int) -> Names:
            return partial(self._names_of, batches, number)

        ticks = deque(self._end.post_tick(behind(number)) for number in range(wire.AHEAD))
        arriving: deque[list[_Arriving]] = deque()
        stopped = False
        for number in range(1, len(batches) + wire.AHEAD + 1):
            due = number - wire.AHEAD
            if due > 0 and self._shared is None:
                self._take_batch(due, arriving.popleft())
            tick = self._end.take_tick(ticks.popleft(), number, behind(due))
            self._digests.append(tick.digests)
            stopped = stopped or tick.verdict is Verdict.STOP
            if due > 0 and self._shared is not None:
                if not stopped:
                    self._take_batch(due, self._post(due, batches[due - 1]))
                self._end.send_taken(due, behind(due))
            if not stopped and number <= len(batches):
                if self._shared is None:
                    arriving.append(self._post(number, batches[number - 1]))
                ticks.append(self._end.post_tick(behind(number)))
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
        return [self._post_block(number, block) for block in batch]

    def _post_block(self, number: int, block: int) -> _Arriving:
        assert self._offered is not None
        assert self._landing is not None
        begin, end = self._offered.layout.borders[block : block + 2]
        if self._shared is not None:
            return _Arriving(block, None, self._shared.block(block, end - begin), in_place=False)
        memory = self._landing.in_place(block) if self._error is None else None
        if memory is not None:
            self._last_in_place = number
        into = self._buffer(block, end - begin) if memory is None else memory
        names = partial(self._offered.layout.tensors_in, block)
        return _Arriving(block, self._end.receive(into, "receiving", names), into, memory is not None)

    def _buffer(self, block: int, length: int) -> Tensor:
        slot = block % (wire.AHEAD * wire.BATCH_BLOCKS)
        found = self._buffers.get(slot)
        if found is None or len(found) < length:
            found = self._buffers[slot] = torch.empty(length, dtype=torch.uint8, device=self._link.device)
        return found[:length]

    def _take_batch(self, number: int, arriving: list[_Arriving]) -> None:
        """Waits for the blocks in order, hashes and delivers them."""
        self._found.append(tuple(self._take_block(each) for each in arriving))
        if self._error is not None and number >= self._last_in_place:
            self._fail_early(self._error)  # nothing is written any more

    def _take_block(self, each: _Arriving) -> int:
        assert self._offered is not None
        if each.pending is not None:
            self._end.wait(each.pending, "receiving", partial(self._offered.layout.tensors_in, each.block))
        if self._error is not None:
            return 0
        try:
            return self._deliver(each)
        except Exception as error:  # noqa: BLE001  # what fails here, fails the transfer in order
            known = AsyncDCPError(f"a tensor could not be filled: {type(error).__name__}: {error}{_TOUCHED}")
            known.__cause__ = error
            self._error = self._error or known
            return 0

    def _deliver(self, each: _Arriving) -> int:
        """The block's checksum, when it is where it belongs."""
        assert self._offered is not None
        assert self._landing is not None
        with self.trace.span("receive", len(each.into)):
            digest = checksum_of(each.into) if self._offered.checksums else 0
            if each.in_place:
                self._landed += len(each.into)
            else:
                self._landing.deliver(each.block, each.into)
        return digest

    def _verify(self, offered: Offered, batches: list[range]) -> None:
        for batch, found, told in zip(batches, self._found, self._digests[wire.AHEAD :], strict=True):
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
