"""CheckpointStager: one save's staging, slab by slab in image order, several copies at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeAlias

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from asyncdcp.errors import TornSnapshotError
from asyncdcp.pipeline.channel import Channel
from asyncdcp.pipeline.messages import SlabReady
from asyncdcp.planning import SavePlan, Slab
from asyncdcp.staging.arenas import StagingArena
from asyncdcp.staging.copier import SlabCopier
from asyncdcp.staging.sources import Sources
from asyncdcp.threads import on_executor, on_thread
from asyncdcp.trace import Trace
from asyncdcp.unwinding import ungrouped

COPIES_IN_FLIGHT = 2
SLABS_A_TRIP = 4
"""So many slabs are copied in one trip to a thread, if their slots are free: a trip costs a tenth of a slab's copy."""

Announce: TypeAlias = Callable[[SlabReady], Awaitable[None]]


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
                    tasks.start_soon(self._announce_arrivals, arriving, announce)
                    with arriving:
                        await self._copy_all(copier, limiter, arriving, announce)
                        self._check(await on_thread(limiter, changed))
                        sources.enqueued(await on_thread(limiter, copier.marks) if sources.fence.devices else [])
        except BaseException:
            if sources.fence.devices:  # no source is read there and no slot written any more, whatever went wrong
                await on_executor(copier.finish)
            raise

    async def _copy_all(
        self, copier: SlabCopier, limiter: anyio.CapacityLimiter, arriving: Channel[_Arriving], announce: Announce
    ) -> None:
        left = deque(self._plan.slabs)

        async def work() -> None:
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

        async with anyio.create_task_group() as workers:
            for _ in range(COPIES_IN_FLIGHT):
                workers.start_soon(work)

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
