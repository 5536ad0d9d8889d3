"""One send: a state, staged once and sent to several ranks at a time. See ``wire.py`` for the order of messages."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import anyio
import msgspec

from asyncdcp.engine import Engine
from asyncdcp.errors import AsyncDCPError, Cancelled, TornSnapshotError
from asyncdcp.staging import Sources
from asyncdcp.threads import on_thread
from asyncdcp.trace import Trace
from asyncdcp.transport import wire
from asyncdcp.transport.blocks import Stager
from asyncdcp.transport.endpoint import Endpoint, Turns, named
from asyncdcp.transport.handle import SendHandle, SendReport
from asyncdcp.transport.lane import Flow, Lane, Staged
from asyncdcp.transport.link import Link
from asyncdcp.transport.options import TransportOptions
from asyncdcp.transport.shared import SharedPool
from asyncdcp.transport.stream import Stream
from asyncdcp.transport.wire import Offer, Tick, Verdict
from asyncdcp.unwinding import drop_frames, ungrouped

T = TypeVar("T")


@dataclass
class SendRequest:
    """A send as the caller's thread hands it over. ``sources`` are dropped as soon as nothing reads them."""

    ranks: tuple[int, ...]
    stream: Stream
    values: bytes
    sources: Sources
    trace: Trace
    begun: float
    pool: SharedPool | None
    """Of memory that may be shared with receivers, if this state is to be."""


class SendTask:
    """Carries one send out on the engine's loop. ``handle``'s futures are resolved here and nowhere else."""

    def __init__(
        self, request: SendRequest, engine: Engine, link: Link, timeout: float, options: TransportOptions
    ) -> None:
        self.request = request
        self._options = options
        whole = options.staging == "whole"
        self._stager = Stager(request.stream, link.device, request.pool, whole=whole, checksums=options.checksums)
        self._rank = link.rank
        self._flow = Flow(request.stream, request.trace)
        self._lanes = [Lane(self._flow, Endpoint(link, rank, timeout, sender=True)) for rank in request.ranks]
        self._staged_seconds = 0.0
        ranks = ", ".join(map(str, request.ranks))
        self.handle = SendHandle(
            engine.future(f"staging of the send to rank {ranks}", cancel=self.cancel),
            engine.future(f"send to rank {ranks}", cancel=self.cancel),
            request.sources.hold,
        )

    @cached_property
    def _limiter(self) -> anyio.CapacityLimiter:
        """Made at its first use, on the engine's loop, as an ``Endpoint``'s."""
        return anyio.CapacityLimiter(1)

    def cancel(self) -> None:
        """Gives the send up: no further batch is staged, and the receivers are told."""
        self._flow.fail(Cancelled(f"the {self.handle.sent.name} was cancelled"))

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
        for each in (error, *(lane.error for lane in self._lanes if lane.error is not None)):
            drop_frames(each)  # they hold blocks
        self.handle.staged.fail(error)
        self.handle.sent.fail(error)

    async def _send(self) -> SendReport:
        request = self.request
        offer = await on_thread(self._limiter, self._try, self._offer)
        offered = self._flow.error is None  # else every lane says so, and nothing more
        with ungrouped():
            async with anyio.create_task_group() as tasks:
                for lane in self._lanes:
                    tasks.start_soon(lane.run, offer or ())
                try:
                    if offered:
                        await on_thread(self._limiter, self._feed)
                finally:
                    self._end_lanes()
        if all(lane.done for lane in self._lanes):
            self._flow.error = None  # it was given up too late
            self._staged()
        if self._flow.error is not None:
            raise self._flow.error
        failed = [lane.error for lane in self._lanes if lane.error is not None]
        for other in failed[1:]:
            failed[0].add_note(str(other))
        if failed:
            raise failed[0]
        plan = request.stream.plan
        seconds = time.monotonic() - request.begun
        return SendReport(request.ranks, len(plan.structure.tensors), plan.tensor_bytes, self._staged_seconds, seconds)

    def _offer(self) -> tuple[bytes, bytes]:
        self._stager.reserve()
        plan, values = msgspec.Raw(self.request.stream.encoded), msgspec.Raw(self.request.values)
        shared = self._stager.share()
        self._flow.shares = shared is not None
        return wire.encode(Offer(self._rank, self._options.checksums, plan, values, shared))

    # ── staging, once for all ──

    def _feed(self) -> None:
        """Stages the batches and hands them to all lanes; after an error, the one that was licensed before it. Blocks,
        on a thread, until all is sent.
        """
        last, stopped = len(self.request.stream.batches), False
        self._try(partial(self._stager.begin, self.request.sources))
        if self._flow.shares:
            self._flow.wait(self._sharing_known)
        for number in range(1, last + 1):
            self._wait_for_room(number)
            if not any(lane.live for lane in self._lanes):
                break
            shared = any(lane.live and lane.shared is not False for lane in self._lanes)
            batch = self._try(partial(self._stager.stage, number, shared=shared))
            if number == last:
                self._try(self._check_torn)
            verdict = Verdict.GO if self._flow.error is None else Verdict.STOP
            tick = Tick(number + wire.AHEAD, verdict, batch.digests if batch else ())
            for lane in self._lanes:
                lane.give(Staged(batch or self._stager.blank(number), tick))
            if stopped:
                break
            stopped = verdict is Verdict.STOP
        self._end_lanes()
        if self._options.staging == "whole":
            self._staged()
        self._flow.wait(lambda: not any(lane.live and not lane.all_sent for lane in self._lanes))
        self._staged()

    def _end_lanes(self) -> None:
        for lane in self._lanes:
            lane.end()

    def _try(self, work: Callable[[], T]) -> T | None:
        """Unless the send has failed; if it fails now, all of it does."""
        if self._flow.error is None:
            try:
                return work()
            except AsyncDCPError as error:
                self._flow.fail(error)
            except Exception as error:  # noqa: BLE001  # whatever it is, the receivers must be told
                known = AsyncDCPError(f"the state could not be staged: {type(error).__name__}: {error}")
                known.__cause__ = error
                self._flow.fail(known)
        return None

    def _check_torn(self) -> None:
        names = self._stager.torn()
        if names:
            raise TornSnapshotError(
                f"changed while they were being sent: {named(names)}; wait for staged before changing tensors, or "
                "guard the optimizer",
                tensors=names,
            )

    def _sharing_known(self) -> bool:
        """Whether a receiver takes blocks from shared memory, or none does: before, no memory is taken for it."""
        live = [lane.shared for lane in self._lanes if lane.live]
        return any(live) or None not in live or self._flow.error is not None

    def _wait_for_room(self, number: int) -> None:
        """Until no lane needs the buffers of batch ``number - AHEAD`` any more."""
        if self._options.staging == "bounded":
            self._flow.wait(lambda: not any(lane.live and lane.finished < number - wire.AHEAD for lane in self._lanes))

    def _staged(self) -> None:
        """No tensor is read any more."""
        if self._flow.error is None and not self.handle.staged.done():
            self._staged_seconds = time.monotonic() - self.request.begun
            self._stager.end()
            self.request.sources.drop()
            self.handle.staged.resolve(None)
