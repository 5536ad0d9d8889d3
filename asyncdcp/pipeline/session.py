"""A session: one save in a pipeline, as the trainer's side sees it. Here the pipeline runs on the engine's own loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from asyncdcp.arena import Arena
from asyncdcp.errors import AsyncDCPError
from asyncdcp.extensions import PLAIN, Chain
from asyncdcp.pipeline.channel import Channel
from asyncdcp.pipeline.messages import Saved, SaveJob, SlabReady
from asyncdcp.pipeline.settle import Reason
from asyncdcp.pipeline.writer import CheckpointWriter
from asyncdcp.storage.port import Storage
from asyncdcp.trace import Trace


@dataclass(frozen=True)
class SessionRequest:
    """What a session needs to know of a save. ``on_free`` hears of each slot that is free again, on the loop."""

    job: SaveJob
    storage: Storage
    arena: Arena
    on_free: Callable[[int], None]
    trace: Trace
    chain: Chain = PLAIN


class SaveSession(Protocol):
    """One save: slabs go in, freed slots and one outcome come back."""

    @property
    def begun(self) -> bool:
        """Whether the pipeline knows of the save; then only ``run`` tells what becomes of it, and it cannot be begun
        a second time.
        """
        ...

    @property
    def quiet(self) -> bool:
        """After ``run``: whether the pipeline uses none of the save's slots any more. If not, it never says when, and
        the arena is lost.
        """
        ...

    async def announce(self, slab: SlabReady) -> None:
        """Hands a filled slot to the pipeline, which owns it until it gives it back."""
        ...

    async def staging_done(self) -> None:
        """All slabs were announced. On return the pipeline has heard so."""
        ...

    def give_up(self, kind: str, error: AsyncDCPError) -> None:
        """Asks the save to end without a commit, if it still can; ``run`` then raises ``error``."""
        ...

    async def run(self) -> Saved:
        """Works until the save is settled. See ``CheckpointWriter.run``."""
        ...


class Pipeline(Protocol):
    """Where the saves of a checkpointer run. On one loop, but for ``warn_unless_travels``."""

    def open(self, request: SessionRequest) -> SaveSession:
        """A session for a save."""
        ...

    def warn_unless_travels(self, storage: Storage, chain: Chain) -> None:
        """Says so, once, where saves to ``storage`` do not run where the user would expect; on the caller's thread."""
        ...

    async def start(self) -> None:
        """Does ahead what the first save would wait for."""
        ...

    def tidy(self) -> None:
        """Called after each save, when its arena was released."""
        ...

    async def aclose(self) -> None:
        """Ends it. No session is under way, or whoever runs it has given it up."""
        ...


class ThreadPipeline:
    """Saves run on the loop of the checkpointer's own engine."""

    def open(self, request: SessionRequest) -> SaveSession:
        return LocalSession(request)

    def warn_unless_travels(self, storage: Storage, chain: Chain) -> None:
        pass

    async def start(self) -> None:
        pass

    def tidy(self) -> None:
        pass

    async def aclose(self) -> None:
        pass


class LocalSession:
    """The save runs in this process, on the loop that calls ``run``."""

    begun = False
    quiet = True

    def __init__(self, request: SessionRequest) -> None:
        self._slabs: Channel[SlabReady] = Channel(request.arena.nbytes)
        source = _ArenaSlabs(self._slabs, request.arena, request.on_free)
        self._writer = CheckpointWriter(request.job, request.storage, source, request.trace, request.chain)

    async def announce(self, slab: SlabReady) -> None:
        await self._slabs.send(slab, slab.length)

    async def staging_done(self) -> None:
        self._slabs.close()

    def give_up(self, kind: str, error: AsyncDCPError) -> None:
        self._writer.give_up.set(Reason(kind, error))

    async def run(self) -> Saved:
        return await self._writer.run()


class _ArenaSlabs:
    """The writer's ``SlabSource``. Apart from the session, which has the writer: the two would hold each other, and the
    storage, until the garbage collector came by.
    """

    def __init__(self, slabs: Channel[SlabReady], arena: Arena, on_free: Callable[[int], None]) -> None:
        self._slabs = slabs
        self._arena = arena
        self._on_free = on_free

    async def receive(self) -> SlabReady:
        return await self._slabs.receive()

    def view(self, slot: int) -> memoryview:
        return self._arena.slot(slot)

    def done(self, slot: int) -> None:
        self._on_free(slot)
