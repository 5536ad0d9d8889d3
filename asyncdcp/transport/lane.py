"""The ways of one send: to each receiver a lane of its own, on a thread from the first block to the last."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from asyncdcp.errors import AsyncDCPError, PeerError
from asyncdcp.trace import Span, Trace
from asyncdcp.transport import wire
from asyncdcp.transport.blocks import Batch
from asyncdcp.transport.endpoint import Endpoint
from asyncdcp.transport.stream import Stream
from asyncdcp.transport.wire import Accept, Done, Failure, Tick, Verdict
from asyncdcp.worker.failures import to_frame


class Staged(NamedTuple):
    """A batch, and the tick that follows it."""

    batch: Batch
    tick: Tick


class _UnderWay(NamedTuple):
    """Something that was posted with a batch, and the wait for it."""

    batch: int
    wait: Callable[[], None]


class Flow:
    """What all lanes of a send share. Who waits for one of them waits here; every lane ends by its timeout."""

    def __init__(self, stream: Stream, trace: Trace) -> None:
        self.stream = stream
        self.trace = trace
        self.error: AsyncDCPError | None = None
        """Why the whole send is given up; the first counts."""
        self.shares = False
        """Whether shared memory was offered."""
        self._changed = threading.Condition()

    def fail(self, error: AsyncDCPError) -> None:
        """From any thread."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()

    def change(self, change: Callable[[], object]) -> None:
        """Does it, and wakes who waits."""
        with self._changed:
            change()
            self._changed.notify_all()

    def wait(self, until: Callable[[], object]) -> None:
        """Blocks until it is true."""
        with self._changed:
            self._changed.wait_for(until)


class Lane:
    """The way to one receiver. Its failure is its own: the others go on."""

    def __init__(self, flow: Flow, endpoint: Endpoint) -> None:
        self.error: AsyncDCPError | None = None
        self.live = True
        self.finished = 0
        """The last batch of which every byte is sent, or taken."""
        self.all_sent = False
        self.done = False
        """The receiver has verified all of it."""
        self.shared: bool | None = None
        """Whether its receiver takes the blocks from shared memory; None until that is known."""
        self._flow = flow
        self._end = endpoint
        self._under_way: deque[_UnderWay] = deque()
        self._given: deque[Staged] = deque()
        self._ended = False

    # ── for who feeds it ──

    def give(self, staged: Staged) -> None:
        """The next batch; one that comes too late is let go."""
        self._flow.change(partial(self._give, staged))

    def end(self) -> None:
        """There are no more."""
        self._flow.change(self._end_given)

    # ── on the loop ──

    async def run(self, offer: Sequence[bytes]) -> None:
        """From the offer, an encoded message, to the receiver's last word."""
        peer, flow = self._end.peer, self._flow
        try:
            if flow.error is None and await self._carried_out(offer):
                await self._end.hear(Done, f"waiting for rank {peer} to have verified the state")
                self.done = True
            elif flow.error is not None:
                await self._end.say(Failure(to_frame(flow.error, with_traceback=False)), "giving the send up")
        except AsyncDCPError as error:
            self.error = error
        finally:
            flow.change(self._close)

    async def _carried_out(self, offer: Sequence[bytes]) -> bool:
        """Whether all was sent. Who has accepted waits for ticks: a send that failed meanwhile says so by them."""
        await self._end.call(self._end.say_all, offer, "sending the offer of the state")
        accept = await self._end.hear(Accept, f"waiting for rank {self._end.peer} to accept the state")
        if accept.shared and not self._flow.shares:
            raise PeerError(f"rank {self._end.peer} takes blocks from shared memory, and none was offered")
        self._flow.change(partial(self._mark_shared, shared=accept.shared))
        return await self._end.call_long(self._stream)

    def _give(self, staged: Staged) -> None:
        if self.live:
            self._given.append(staged)

    def _end_given(self) -> None:
        self._ended = True

    def _mark_shared(self, *, shared: bool) -> None:
        self.shared = shared

    def _mark_sent(self) -> None:
        self.all_sent = True

    def _close(self) -> None:
        self.live = False
        self._under_way.clear()
        self._given.clear()

    # ── blocking, on a thread ──

    def _stream(self) -> bool:
        """Whether all was sent, and not stopped."""
        verdict = Verdict.GO if self._flow.error is None else Verdict.STOP
        for number in range(1, wire.AHEAD + 1):
            self._post_tick(0, Tick(number, verdict))
        if verdict is Verdict.STOP:
            return False
        last = len(self._flow.stream.batches)
        while (staged := self._next()) is not None:
            verdict, number = staged.tick.verdict, staged.batch.number
            self._post(staged)
            del staged
            self._finish(number - wire.AHEAD + 1)
        self._finish(last, stopped=verdict is Verdict.STOP)
        if verdict is Verdict.GO:
            self._flow.change(self._mark_sent)
        return verdict is Verdict.GO

    def _next(self) -> Staged | None:
        self._flow.wait(lambda: self._given or self._ended)
        return self._given.popleft() if self._given else None

    def _post(self, staged: Staged) -> None:
        """The batch's blocks, and the tick after them; or the tick alone, if they are shared, until they are taken."""
        number, stream = staged.batch.number, self._flow.stream
        if self.shared:
            names = partial(stream.names_in, number)
            taken = partial(self._end.wait_taken, self._end.post_taken(names), number, names)
            self._under_way.append(_UnderWay(number, taken))
            self._post_tick(number, staged.tick)
            return
        for block, data in zip(stream.batches[number - 1], staged.batch.blocks, strict=True):
            names = partial(stream.names, stream.blocks[block])
            sent = partial(self._end.wait, self._end.send(data, "sending", names), "sending", names)
            self._under_way.append(_UnderWay(number, sent))
        self._post_tick(number, staged.tick)

    def _post_tick(self, batch: int, tick: Tick) -> None:
        names = partial(self._flow.stream.names_in, batch) if batch else tuple
        pending = self._end.send_bytes(wire.encode_tick(tick), "sending", names)
        self._under_way.append(_UnderWay(batch, partial(self._end.wait, pending, "sending", names)))

    def _finish(self, number: int, *, stopped: bool = False) -> None:
        """Waits for all that was posted up to batch ``number``, its tick included."""
        while self._under_way and self._under_way[0].batch <= number:
            self._under_way[0].wait()
            self._under_way.popleft()
        if not stopped:
            self._flow.change(partial(self._advance, number))

    def _advance(self, number: int) -> None:
        """Every byte up to batch ``number`` is sent, or taken."""
        stream = self._flow.stream
        nbytes = sum(stream.blocks[block].length for n in range(self.finished, number) for block in stream.batches[n])
        self.finished = max(self.finished, number)
        if nbytes:
            now = time.monotonic()
            self._flow.trace.add(Span("send", now, now, nbytes))
