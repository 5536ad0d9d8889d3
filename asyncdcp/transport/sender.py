"""One send: a state, staged once and sent to several ranks at a time. See ``wire.py`` for the order of messages."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import anyio
import msgspec

from asyncdcp.engine import Engine
from asyncdcp.errors import AsyncDCPError, Cancelled, TornSnapshotError, ungrouped
from asyncdcp.pipeline.channel import Channel
from asyncdcp.staging import Sources
from asyncdcp.threads import on_thread
from asyncdcp.trace import Span, Trace
from asyncdcp.transport import wire
from asyncdcp.transport.blocks import Batch, Stager
from asyncdcp.transport.endpoint import Endpoint, named
from asyncdcp.transport.handle import SendHandle
from asyncdcp.transport.link import Link, Pending
from asyncdcp.transport.options import TransportOptions
from asyncdcp.transport.reports import SendReport
from asyncdcp.transport.stream import Stream
from asyncdcp.transport.turns import Turns
from asyncdcp.transport.wire import Accept, Done, Failure, Offer, Tick, Verdict
from asyncdcp.worker.failures import to_frame


@dataclass
class SendRequest:
    """A send as the caller's thread hands it over. ``sources`` are dropped as soon as nothing reads them."""

    ranks: tuple[int, ...]
    stream: Stream
    values: bytes
    sources: Sources
    trace: Trace
    begun: float


class _Staged:
    """A batch, and the tick that follows it."""

    def __init__(self, batch: Batch, tick: Tick) -> None:
        self.batch = batch
        self.tick = tick


class SendTask:
    """Carries one send out on the engine's loop. ``handle``'s futures are resolved here and nowhere else."""

    def __init__(
        self, request: SendRequest, engine: Engine, link: Link, timeout: float, options: TransportOptions
    ) -> None:
        self.request = request
        self._options = options
        self._limiter = anyio.CapacityLimiter(1)
        whole = options.staging == "whole"
        self._stager = Stager(request.stream, link.device, whole=whole, checksums=options.checksums)
        self._rank = link.rank
        self._lanes = [_Lane(self, Endpoint(link, rank, timeout, sender=True)) for rank in request.ranks]
        self._moved = anyio.Event()
        self._staged_seconds = 0.0
        self.error: AsyncDCPError | None = None
        ranks = ", ".join(map(str, request.ranks))
        self.handle = SendHandle(
            engine.future(f"staging of the send to rank {ranks}", cancel=self.cancel),
            engine.future(f"send to rank {ranks}", cancel=self.cancel),
            request.sources.hold,
        )

    def cancel(self) -> None:
        """Gives the send up: no further batch is staged, and the receivers are told."""
        self.error = self.error or Cancelled(f"the {self.handle.sent.name} was cancelled")
        self.moved()

    async def run(self, turns: Turns) -> None:
        """Never raises but for cancellation, at the engine's end."""
        try:
            async with turns.of("to", self.request.ranks):
                report = await self._send()
        except AsyncDCPError as error:
            self._settle(error)
        except BaseException as error:
            known = Cancelled("the send was given up when its transport closed")
            if isinstance(error, Exception):
                known = AsyncDCPError(f"the send failed: {type(error).__name__}: {error}")  # type: ignore[assignment]  # the tree's root
            known.__cause__ = error
            self._settle(known)
            if not isinstance(error, Exception):
                raise
        else:
            self.handle.sent.resolve(report)

    def _settle(self, error: AsyncDCPError) -> None:
        self.request.sources.drop()
        self._stager.end()
        self.handle.staged.fail(error)
        self.handle.sent.fail(error)

    async def _send(self) -> SendReport:
        request = self.request
        message = await on_thread(self._limiter, self._offer)
        with ungrouped():
            async with anyio.create_task_group() as tasks:
                for lane in self._lanes:
                    tasks.start_soon(lane.run, message)
                await self._feed()
                await self._all_sent()
                self._staged()
        if all(lane.done for lane in self._lanes):
            self.error = None  # it was given up too late
            self._staged()
        if self.error is not None:
            raise self.error
        failed = [lane.error for lane in self._lanes if lane.error is not None]
        for other in failed[1:]:
            failed[0].add_note(str(other))
        if failed:
            raise failed[0]
        plan = request.stream.plan
        seconds = time.monotonic() - request.begun
        return SendReport(request.ranks, len(plan.structure.tensors), plan.tensor_bytes, self._staged_seconds, seconds)

    def _offer(self) -> tuple[bytes, bytes]:
        plan, values = msgspec.Raw(self.request.stream.encoded), msgspec.Raw(self.request.values)
        return wire.encode(Offer(self._rank, self._options.checksums, plan, values))

    # ── staging, once for all ──

    async def _feed(self) -> None:
        """Stages the batches and hands them to all lanes; after an error, the one that was licensed before it."""
        last, stopped = len(self.request.stream.batches), False
        await self._try(partial(self._stager.begin, self.request.sources))
        for number in range(1, last + 1):
            await self._room(number)
            if not any(lane.live for lane in self._lanes):
                break
            batch = await self._try(partial(self._stager.stage, number))
            if number == last and self.error is None:
                await self._try(self._check_torn)
            tick = Tick(number + 2, Verdict.GO if self.error is None else Verdict.STOP, batch.digests if batch else ())
            for lane in self._lanes:
                await lane.give(_Staged(batch or self._stager.blank(number), tick))
            if stopped:
                break
            stopped = self.error is not None
        for lane in self._lanes:
            lane.end()
        if self._options.staging == "whole":
            self._staged()

    async def _try(self, work: Callable[[], Batch | None]) -> Batch | None:
        """On a thread, unless the send has failed; if it fails now, all of it does."""
        if self.error is None:
            try:
                return await on_thread(self._limiter, work)
            except AsyncDCPError as error:
                self.error = self.error or error
            except Exception as error:  # noqa: BLE001  # whatever it is, the receivers must be told
                known = AsyncDCPError(f"the state could not be staged: {type(error).__name__}: {error}")
                known.__cause__ = error
                self.error = self.error or known
        return None

    def _check_torn(self) -> None:
        names = self._stager.torn()
        if names:
            raise TornSnapshotError(
                f"changed while they were being sent: {named(names)}; wait for staged before changing tensors, or "
                "guard the optimizer",
                tensors=names,
            )

    async def _room(self, number: int) -> None:
        """Waits until no lane needs the buffers of batch ``number - 2`` any more."""
        while self._options.staging == "bounded" and any(
            lane.live and lane.finished < number - 2 for lane in self._lanes
        ):
            await self._moved.wait()

    async def _all_sent(self) -> None:
        while any(lane.live and not lane.all_sent for lane in self._lanes):
            await self._moved.wait()

    def moved(self) -> None:
        """A lane has come further, or ended."""
        self._moved.set()
        self._moved = anyio.Event()

    def _staged(self) -> None:
        """No tensor is read any more."""
        if self.error is None and not self.handle.staged.done():
            self._staged_seconds = time.monotonic() - self.request.begun
            self._stager.end()
            self.request.sources.drop()
            self.handle.staged.resolve(None)


class _Lane:
    """The way to one receiver. Its failure is its own: the others go on."""

    def __init__(self, task: SendTask, endpoint: Endpoint) -> None:
        self.error: AsyncDCPError | None = None
        self.live = True
        self.finished = 0
        """The last batch of which every byte is sent."""
        self.all_sent = False
        self.done = False
        """The receiver has verified all of it."""
        self._task = task
        self._end = endpoint
        self._under_way: list[tuple[Pending, int]] = []
        self._batches: Channel[_Staged] = Channel(0)

    async def give(self, staged: _Staged) -> None:
        """The next batch."""
        if self.live:
            await self._batches.send(staged, 0)

    def end(self) -> None:
        """There are no more."""
        self._batches.close()

    async def run(self, offer: tuple[bytes, bytes]) -> None:
        """From the offer to the receiver's last word."""
        peer = self._end.peer
        try:
            if self._task.error is None:
                await self._end.call(self._end.say_all, offer, "sending the offer of the state")
                await self._end.hear(Accept, f"waiting for rank {peer} to accept the state")
            if self._task.error is None and await self._stream():
                self.all_sent = True
                self._task.moved()
                await self._end.hear(Done, f"waiting for rank {peer} to have verified the state")
                self.done = True
            elif self._task.error is not None:
                await self._end.say(Failure(to_frame(self._task.error, with_traceback=False)), "giving the send up")
        except AsyncDCPError as error:
            self.error = error
        finally:
            self._under_way.clear()
            self.live = False
            self._batches.close()
            self._task.moved()

    async def _stream(self) -> bool:
        """Whether all was sent, and not stopped."""
        verdict = Verdict.GO if self._task.error is None else Verdict.STOP
        await self._end.call(self._post_first, verdict)
        if verdict is Verdict.STOP:
            return False
        stopped = False
        async for staged in self._batches:
            stopped = stopped or staged.tick.verdict is Verdict.STOP
            number = staged.batch.number
            await self._end.call(self._post, staged)
            del staged
            await self._end.call(self._finish, number - 1)
            self._advance(number - 1)
        await self._end.call(self._finish, len(self._task.request.stream.batches))
        if not stopped:
            self._advance(len(self._task.request.stream.batches))
        return not stopped

    def _post_first(self, verdict: Verdict) -> None:
        for number in (1, 2):
            self._under_way.append((self._end.send_bytes(wire.encode_tick(Tick(number, verdict)), "sending"), 0))

    def _post(self, staged: _Staged) -> None:
        """The batch's blocks, and the tick after them."""
        number = staged.batch.number
        stream = self._task.request.stream
        for block, data in zip(stream.batches[number - 1], staged.batch.blocks, strict=True):
            names = partial(stream.names, stream.blocks[block])
            self._under_way.append((self._end.send(data, "sending", names), block + 1))
        self._under_way.append((self._end.send_bytes(wire.encode_tick(staged.tick), "sending"), -number))

    def _finish(self, number: int) -> None:
        """Waits for all that was posted up to batch ``number``, its tick included."""
        stream = self._task.request.stream
        blocks = stream.batches[number - 1].stop if number else 0
        while self._under_way:
            pending, what = self._under_way[0]
            if what > blocks or -what > number:
                return
            names = partial(stream.names, stream.blocks[what - 1]) if what > 0 else tuple
            self._end.wait(pending, "sending", names)
            self._under_way.pop(0)

    def _advance(self, number: int) -> None:
        """Every byte up to batch ``number`` is sent."""
        stream = self._task.request.stream
        nbytes = sum(stream.blocks[block].length for n in range(self.finished, number) for block in stream.batches[n])
        self.finished = max(self.finished, number)
        if nbytes:
            now = time.monotonic()
            self._task.request.trace.add(Span("send", now, now, nbytes))
        self._task.moved()
