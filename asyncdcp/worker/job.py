"""One save in the worker: slabs by message in, the same CheckpointWriter as on a thread, one answer out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import anyio

from asyncdcp.arena import Arena
from asyncdcp.errors import AsyncDCPError, PeerError
from asyncdcp.extensions import Chain
from asyncdcp.pipeline.messages import SaveJob, SlabReady
from asyncdcp.pipeline.settle import Reason
from asyncdcp.pipeline.writer import CheckpointWriter
from asyncdcp.storage import Storage
from asyncdcp.trace import Span, Trace
from asyncdcp.worker.failures import from_frame, to_frame
from asyncdcp.worker.protocol import Done, Failed, Freed, SaveEvent, SaveState, Spans, Stop, ToTrainer, save_machine

_SPANS_EVERY = 0.05


class SpanBatch:
    """Spans on their way to the trainer, some at a time: the first waits ``_SPANS_EVERY`` seconds for more."""

    def __init__(self, save: str, post: Callable[[ToTrainer], object]) -> None:
        self._save = save
        self._post = post
        self._spans: list[tuple[str, float, float, int]] = []
        self._timer: asyncio.TimerHandle | None = None

    def add(self, span: Span, total: int) -> None:
        """Takes a span, as the trace's listener; on the loop."""
        self._spans.append((span.stage, span.start, span.end, span.bytes))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SPANS_EVERY, self.flush)

    def flush(self) -> None:
        """Sends what is there."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._spans:
            self._post(Spans(self._save, self._spans))
            self._spans = []


class Job:
    """A save that was begun. Slots are given back by ``Freed`` as they are written, and all are by the answer."""

    def __init__(
        self, job: SaveJob, storage: Storage, arena: Arena, chain: Chain, post: Callable[[ToTrainer], object]
    ) -> None:
        self.id = job.save_id
        self.settled = anyio.Event()
        self.written = anyio.Event()
        """Nothing of the arena is used any more, nor will be."""
        self._post = post
        self._arena = arena
        self._slabs: list[SlabReady] = []
        self._in_use = 0
        self._more = anyio.Event()
        self._closed = False
        self._spans = SpanBatch(job.save_id, post)
        self._writer = CheckpointWriter(job, storage, self, Trace(self._spans.add), chain)
        self._given_up = anyio.Event()
        self._machine = save_machine()
        self._machine.on(SaveEvent.BEGIN)

    # ── what the trainer says ──

    def slab(self, slab: SlabReady) -> None:
        """A slot was filled."""
        if self._machine.on(SaveEvent.SLAB) is not SaveState.SETTLED:
            self._slabs.append(slab)
            self._in_use += 1
            self._wake()

    def staged(self) -> None:
        """No more slabs."""
        self._machine.on(SaveEvent.STAGED)
        self._closed = True
        self._look_if_written()
        self._wake()

    def stop(self, message: Stop) -> None:
        """The trainer gives up."""
        if self._machine.on(SaveEvent.STOP) is not SaveState.SETTLED:
            self._give_up(Reason(message.kind, from_frame(message.error)))

    def trainer_died(self) -> None:
        """What is staged is carried on with; what is not can never be whole, and is given up."""
        if self._machine.state is SaveState.STAGING:
            self._machine.on(SaveEvent.DIED)
            self._give_up(Reason("failed", PeerError("the trainer died before the save was staged")))

    def _give_up(self, reason: Reason) -> None:
        self._writer.give_up.set(reason)
        self._given_up.set()

    # ── the save ──

    async def run(self, earlier: Job | None) -> None:
        """Settles the save, after ``earlier`` is settled or at once if it is given up, and answers. Raises nothing
        but cancellation.
        """
        answer: Done | Failed
        try:
            if earlier is not None:
                await self._turn(earlier)
            saved = await self._writer.run()
        except AsyncDCPError as error:
            answer = Failed(self.id, to_frame(error))
        except Exception as error:  # noqa: BLE001  # a bug in one save ends this save
            answer = Failed(self.id, to_frame(error))
        else:
            answer = Done(self.id, saved)
        self._spans.flush()
        self._machine.on(SaveEvent.ANSWER)
        self._post(answer)
        self.settled.set()
        self.written.set()

    async def _turn(self, earlier: Job) -> None:
        async with anyio.create_task_group() as waits:

            async def end_with(event: anyio.Event) -> None:
                await event.wait()
                waits.cancel_scope.cancel()

            waits.start_soon(end_with, earlier.settled)
            waits.start_soon(end_with, self._given_up)

    # ── the writer's SlabSource ──

    async def receive(self) -> SlabReady:
        while not self._slabs:
            if self._closed:
                raise anyio.EndOfStream
            await self._more.wait()
        return self._slabs.pop(0)

    def view(self, slot: int) -> memoryview:
        return self._arena.slot(slot)

    def done(self, slot: int) -> None:
        self._post(Freed(self.id, slot))
        self._in_use -= 1
        self._look_if_written()

    def _look_if_written(self) -> None:
        if self._closed and not self._in_use:
            self.written.set()

    def _wake(self) -> None:
        more, self._more = self._more, anyio.Event()
        more.set()
