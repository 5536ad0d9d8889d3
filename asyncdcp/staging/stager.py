"""CheckpointStager: one save's staging, slab by slab in image order, several copies at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeAlias

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from asyncdcp.errors import TornSnapshotError, ungrouped
from asyncdcp.pipeline.channel import Channel
from asyncdcp.pipeline.messages import SlabReady
from asyncdcp.planning import SavePlan, Slab
from asyncdcp.staging.arenas import StagingArena
from asyncdcp.staging.copier import SlabCopier
from asyncdcp.staging.sources import Sources
from asyncdcp.threads import on_executor, on_thread
from asyncdcp.trace import Trace

COPIES_IN_FLIGHT = 2

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
        copier = await on_thread(limiter, SlabCopier, self._plan, sources.tensors, sources.fence)
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
        slabs = iter(self._plan.slabs)

        async def work() -> None:
            for slab in slabs:
                _, slot = await self._arena.ring.acquire()
                self.held.add(slot)
                with self._trace.span("stage", slab.length):
                    arrival = await on_thread(limiter, self._fill, copier, slab, slot)
                await checkpoint_if_cancelled()  # the copy ended though; nobody wants to hear of it any more
                ready = SlabReady(slab.file, slab.begin // self._arena.arena.slot_bytes, slot, slab.length)
                if arrival is None:
                    await announce(ready)
                else:
                    await arriving.send(_Arriving(ready, arrival), slab.length)

        async with anyio.create_task_group() as workers:
            for _ in range(COPIES_IN_FLIGHT):
                workers.start_soon(work)

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
