"""A session: one save in a pipeline, as the trainer's side sees it. Here the pipeline runs on the engine's own loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from asyncdcp.arena import Arena
from asyncdcp.errors import AsyncDCPError
from asyncdcp.pipeline.channel import Channel
from asyncdcp.pipeline.messages import Saved, SaveJob, SlabReady
from asyncdcp.pipeline.settle import Reason
from asyncdcp.pipeline.writer import CheckpointWriter
from asyncdcp.storage.port import Storage
from asyncdcp.trace import Trace


class SaveSession(Protocol):
    """One save: slabs go in, freed slots and one outcome come back."""

    async def announce(self, slab: SlabReady) -> None:
        """Hands a filled slot to the pipeline, which owns it until it gives it back."""
        ...

    def staging_done(self) -> None:
        """All slabs were announced."""
        ...

    def give_up(self, kind: str, error: AsyncDCPError) -> None:
        """Asks the save to end without a commit, if it still can; ``run`` then raises ``error``."""
        ...

    async def run(self) -> Saved:
        """Works until the save is settled. See ``CheckpointWriter.run``."""
        ...


class LocalSession:
    """The save runs in this process, on the loop that calls ``run``. ``on_free`` hears of each free slot."""

    def __init__(
        self, job: SaveJob, storage: Storage, arena: Arena, on_free: Callable[[int], None], trace: Trace
    ) -> None:
        self._arena = arena
        self._on_free = on_free
        self._slabs: Channel[SlabReady] = Channel(arena.nbytes)
        self._writer = CheckpointWriter(job, storage, self, trace)

    async def announce(self, slab: SlabReady) -> None:
        await self._slabs.send(slab, slab.length)

    def staging_done(self) -> None:
        self._slabs.close()

    def give_up(self, kind: str, error: AsyncDCPError) -> None:
        self._writer.give_up.set(Reason(kind, error))

    async def run(self) -> Saved:
        return await self._writer.run()

    # ── the writer's SlabSource ──

    async def receive(self) -> SlabReady:
        return await self._slabs.receive()

    def view(self, slot: int) -> memoryview:
        return self._arena.slot(slot)

    def done(self, slot: int) -> None:
        self._on_free(slot)
