"""The arenas of a checkpointer: which one a save stages into, and when its memory is given back."""

from __future__ import annotations

import logging
from collections.abc import Callable

import anyio
import torch
from torch import Tensor

from asyncdcp.arena import Arena
from asyncdcp.slot_ring import SlotRing
from asyncdcp.staging.accelerator import BounceBuffers, register_host_memory
from asyncdcp.threads import on_thread

_logger = logging.getLogger("asyncdcp")


class StagingArena:
    """An arena, its ring of slots, and how many saves use it.

    ``abandoned`` arenas have slots that will never be given back: no save begins to use one, and whoever waits for a
    slot goes elsewhere.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.arena = Arena(slots, slot_bytes)
        self.ring = SlotRing(slots)
        self.users = 0
        self.abandoned = False
        self._prefaulted = bytearray(slots)
        self._unpin: Callable[[], None] | None = None
        self._tried: set[str] = set()
        self.bounce: BounceBuffers | None = None
        """Where copies from accelerators go first, if ``pin`` could not do without."""

    @property
    def slots(self) -> int:
        """How many slabs it holds."""
        return self.arena.slots

    def slot(self, number: int) -> Tensor:
        """A slot's bytes; ``Closed`` after the end."""
        return torch.frombuffer(self.arena.slot(number), dtype=torch.uint8)

    def prefault(self, number: int) -> None:
        """Takes a slot's memory before its first use. Called by one thread for a slot."""
        if not self._prefaulted[number]:
            self.arena.prefault_slot(number)
            self._prefaulted[number] = 1

    def pin(self, device: torch.device) -> None:
        """Pins the memory for copies from accelerators, all of it, once. Takes the memory; a thread's work."""
        if device.type in self._tried:
            return
        self._tried.add(device.type)
        unpin = register_host_memory(self.arena.address, self.arena.nbytes, device)
        if unpin is not None:
            self._unpin = unpin
        elif self.bounce is None:
            self.bounce = BounceBuffers(self.arena.slot_bytes)

    def close(self) -> None:
        """Gives the memory back once nothing holds a view of it."""
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        self.arena.close()


class Arenas:
    """Keeps one arena across saves and replaces it by a larger one when a state outgrows it. Lives on the engine's
    loop.

    ``staging_bytes`` bounds each arena: None stages a whole state at once, a number makes the slots a ring. While a
    save that uses the old arena is under way, old and new exist side by side.
    """

    def __init__(self, slab_bytes: int, staging_bytes: int | None) -> None:
        self._slab_bytes = slab_bytes
        self._limit = None if staging_bytes is None else max(staging_bytes // slab_bytes, 1)
        self._current: StagingArena | None = None
        self._closed = False

    def acquire(self, slabs: int) -> StagingArena:
        """The arena for a save of ``slabs`` slabs; to be released. ``MemoryLimit`` before anything is allocated."""
        wanted = max(slabs if self._limit is None else min(slabs, self._limit), 1)
        if self._current is None or self._current.slots < wanted:
            old, self._current = self._current, None
            if old is not None and not old.users:
                old.close()
            self._current = StagingArena(wanted, self._slab_bytes)
        self._current.users += 1
        return self._current

    async def prepare(self, slabs: int) -> None:
        """Takes the memory of the arena that a save of ``slabs`` slabs will use, all of it."""
        arena = self.acquire(slabs)
        try:
            limiter = anyio.CapacityLimiter(1)
            for slot in range(arena.slots):
                await on_thread(limiter, arena.prefault, slot)
        finally:
            self.release(arena)

    def release(self, arena: StagingArena) -> None:
        """Ends a save's use. An arena that was replaced goes with its last user; after ``close`` all do."""
        arena.users -= 1
        if arena.users or (arena is self._current and not self._closed):
            return
        if arena is self._current:
            self._current = None
        arena.close()

    def abandon(self, arena: StagingArena) -> None:
        """Never gives this arena's memory to another save: who holds its slots may still read them, and never says when
        it stops.
        """
        arena.abandoned = True
        _logger.error("an arena of %d bytes is abandoned: its save never ended", arena.arena.nbytes)
        if arena is self._current:
            self._current = None

    def close(self) -> None:
        """Gives back the arena, at once if nobody uses it, else with its last user. No other is kept from now on."""
        self._closed = True
        if self._current is not None and not self._current.users:
            self._current.close()
        self._current = None
