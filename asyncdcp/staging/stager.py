"""One save's staging: its ``Sources``, the tensors as they are at the call with what is known of who may change them
meanwhile; and ``CheckpointStager``, which copies them slab by slab in image order, several copies at once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import anyio
from anyio.lowlevel import checkpoint_if_cancelled
from torch import Tensor

from asyncdcp.errors import TornSnapshotError
from asyncdcp.pipeline.channel import Channel
from asyncdcp.pipeline.messages import SlabReady
from asyncdcp.planning import SavePlan, Slab
from asyncdcp.staging.accelerator import DeviceFence, Marks
from asyncdcp.staging.arenas import StagingArena
from asyncdcp.staging.copier import SlabCopier
from asyncdcp.staging.guard import EagerBudget, Guard, clone_unguarded, frozen_parameters
from asyncdcp.staging.torn import Witness, versions
from asyncdcp.threads import on_executor, on_thread
from asyncdcp.trace import Trace
from asyncdcp.unwinding import all_of, frameless, ungrouped

COPIES_IN_FLIGHT = 2
SLABS_A_TRIP = 4
"""So many slabs are copied in one trip to a thread, if their slots are free: a trip costs a tenth of a slab's copy."""
Announce: TypeAlias = Callable[[SlabReady], Awaitable[None]]


class Sources:
    """The tensors of one save, one for each chunk of the plan's structure; taken on the caller's thread.

    With ``guards``, what they do not protect is cloned now, up to the budget, but for parameters without gradient:
    those are not expected to change. ``watched`` are the numbers of the tensors that somebody could change during
    staging, these among them.
    """

    def __init__(
        self, tensors: list[Tensor], guards: Sequence[Guard], statefuls: Iterable[object], budget: EagerBudget
    ) -> None:
        self.tensors = tensors
        self.watched: Iterable[int] = range(len(tensors))
        self._budget = budget
        self._eager = 0
        try:
            if guards:
                guarded = [tensor for guard in guards for tensor in guard.tensors()]
                frozen = list(frozen_parameters(iter(statefuls)))
                still = {tensor.data_ptr() for tensor in frozen if not tensor.is_meta}
                exposed, self._eager = clone_unguarded(tensors, [*guarded, *frozen], budget)
                self.watched = exposed | {n for n, tensor in enumerate(tensors) if tensor.data_ptr() in still}
            self.fence = DeviceFence(tensors)
            self._versions = versions(tensors)
        except BaseException:  # refused while a graph is captured; Control-C
            budget.give(self._eager)
            raise
        self._marks: Marks = []
        self._passable, self._free = threading.Event(), threading.Event()

    def select(self, picks: Sequence[tuple[int, int, int]]) -> None:
        """Keeps what is to be written: of tensor ``number`` the rows ``begin <= i < end``, of a scalar all."""
        watched = set(self.watched)
        kept = [self.tensors[number] for number, _, _ in picks]
        self._versions = [self._versions[number] for number, _, _ in picks]
        self.watched = [place for place, (number, _, _) in enumerate(picks) if number in watched]
        self.tensors[:] = [
            tensor.detach().narrow(0, begin, end - begin) if tensor.dim() and end - begin != tensor.shape[0] else tensor
            for tensor, (_, begin, end) in zip(kept, picks, strict=True)
        ]

    def witness(self) -> Callable[[], list[int]]:
        """Looks at the watched tensors as copying begins; the result tells which have changed since the save was
        called.
        """
        return Witness(self.tensors, self._versions, self.watched).changed

    def enqueued(self, marks: Marks) -> None:
        """All is copied but for what accelerators have been told to copy, which has been read at ``marks``."""
        self._marks = marks
        self._passable.set()

    def hold(self, timeout: float) -> bool:
        """Blocks until what the calling thread does, or enqueues on its current streams, from now on changes nothing
        that the save still reads; whether that came.

        The streams wait for copies under way there, and the host does not. A stream that is being captured cannot wait
        for anything outside of its graph, so then the host does.
        """
        until = time.monotonic() + timeout
        if not self._passable.wait(timeout):
            return False
        marks = [] if self._free.is_set() else self._marks
        if any(work.capturing() for work, _ in marks):
            return self._free.wait(max(min(until - time.monotonic(), timeout), 0))
        for work, mark in marks:
            work.wait(mark)
        return True

    def drop(self) -> None:
        """Lets go of the tensors: they are copied, or never will be. Safe to call twice."""
        self.tensors.clear()
        eager, self._eager = self._eager, 0  # in one step: a save that Control-C cuts off is dropped by two threads
        self._budget.give(eager)
        self._free.set()
        self._passable.set()


class _Arriving(NamedTuple):
    """A slab that an accelerator has been told to copy, and what waits on the host until that is done."""

    ready: SlabReady
    arrival: Callable[[], None]


class CheckpointStager:
    """Stages one save into an arena and announces each slab as it is filled.

    ``held`` are the slots that were taken for this save; whoever learns that a slot is free again takes it out. On
    cancellation, by a scope or of the task itself, no copy is under way any more, and the slots remain held.
    """

    def __init__(self, plan: SavePlan, arena: StagingArena, trace: Trace) -> None:
        self._plan = plan
        self._arena = arena
        self._trace = trace
        self.held: set[int] = set()

    async def stage(self, sources: Sources, announce: Announce) -> None:
        """Copies every slab, in the order of the plan as slots become free, and returns when the last is copied.

        Copies from accelerators are enqueued that far ahead, and waited for and announced behind.
        ``TornSnapshotError`` names the tensors that were seen to change meanwhile.
        """
        limiter = anyio.CapacityLimiter(COPIES_IN_FLIGHT)
        for device in sources.fence.devices:
            await on_thread(limiter, self._arena.pin, device)
        changed = await on_thread(limiter, sources.witness)
        copier = SlabCopier(self._plan, sources.tensors, sources.fence)
        arriving: Channel[_Arriving] = Channel(self._arena.arena.nbytes)
        try:
            with ungrouped():
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(frameless, partial(self._announce_arrivals, arriving, announce))
                    with arriving:
                        await self._copy_all(copier, limiter, arriving, announce)
                        self._check(await on_thread(limiter, changed))
                        sources.enqueued(await on_thread(limiter, copier.marks) if sources.fence.devices else [])
        except BaseException:
            if sources.fence.devices:  # no source is read there and no slot written any more, whatever went wrong
                await on_executor(copier.finish)
            raise
        finally:
            copier.drop()  # a task that was cancelled keeps it

    async def _copy_all(
        self, copier: SlabCopier, limiter: anyio.CapacityLimiter, arriving: Channel[_Arriving], announce: Announce
    ) -> None:
        left = deque(self._plan.slabs)
        await all_of(partial(self._copy_some, left, copier, limiter, arriving, announce), COPIES_IN_FLIGHT)

    async def _copy_some(
        self,
        left: deque[Slab],
        copier: SlabCopier,
        limiter: anyio.CapacityLimiter,
        arriving: Channel[_Arriving],
        announce: Announce,
    ) -> None:
        while left:
            batch = await self._take(left)
            arrivals = await on_thread(limiter, self._fill_all, copier, batch)
            await checkpoint_if_cancelled()  # the copies ended though; nobody wants to hear of them any more
            for (slab, slot), arrival in zip(batch, arrivals, strict=True):
                ready = SlabReady(slab.file, slab.begin // self._arena.arena.slot_bytes, slot, slab.length)
                if arrival is None:
                    await announce(ready)
                else:
                    await arriving.send(_Arriving(ready, arrival), slab.length)

    async def _take(self, left: deque[Slab]) -> list[tuple[Slab, int]]:
        """The next slab, once its slot is free, and some behind it whose slots are free by then; each with its slot."""
        most = min(SLABS_A_TRIP, max(1, len(left) // COPIES_IN_FLIGHT))
        batch = [(left.popleft(), (await self._arena.ring.acquire())[1])]
        self.held.add(batch[0][1])
        while left and len(batch) < most and (granted := self._arena.ring.acquire_nowait()) is not None:
            batch.append((left.popleft(), granted[1]))
            self.held.add(granted[1])
        return batch

    async def _announce_arrivals(self, arriving: Channel[_Arriving], announce: Announce) -> None:
        limiter = anyio.CapacityLimiter(1)
        async for ready, arrival in arriving:
            await on_thread(limiter, arrival)
            await announce(ready)

    def _check(self, torn: list[int]) -> None:
        structure = self._plan.structure
        names = [structure.tensors[structure.chunks[number].tensor].name for number in torn]
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise TornSnapshotError(
                f"changed while they were being copied: {shown}; wait for staged before changing tensors, or guard the "
                "optimizer",
                tensors=names,
            )

    def _fill_all(self, copier: SlabCopier, batch: list[tuple[Slab, int]]) -> list[Callable[[], None] | None]:
        arrivals = []
        for slab, slot in batch:
            with self._trace.span("stage", slab.length):
                arrivals.append(self._fill(copier, slab, slot))
        return arrivals

    def _fill(self, copier: SlabCopier, slab: Slab, slot: int) -> Callable[[], None] | None:
        """What waits for the rest of it, if not all is there."""
        self._arena.prefault(slot)
        into, bounce = self._arena.slot(slot), self._arena.bounce
        if bounce is None or not copier.from_device(slab):
            return copier.copy(slab, into)
        with bounce.around(into, slab.length) as pinned:
            arrival = copier.copy(slab, pinned)
            if arrival is not None:
                arrival()
        return None
