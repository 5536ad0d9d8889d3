"""Lanes: what the saves of a checkpointer share. They stage and write in turns, in the order of their calls, whatever
becomes of those before them.
"""

from __future__ import annotations

import asyncio
from collections import deque

import anyio

from asyncdcp.pipeline.session import Pipeline, ThreadPipeline
from asyncdcp.staging import Arenas
from asyncdcp.unwinding import ungrouped


class Turn:
    """A place in a ``TurnQueue``, which it joins once. May be made on any thread; lives on the engine's loop."""

    def __init__(self) -> None:
        # asyncio's own event, since anyio's would be trio's where a trio program calls save().
        self._event = asyncio.Event()
        self._ended = False
        self._queue: TurnQueue | None = None

    async def wait(self) -> None:
        """Waits for the turn, or until ``leave``."""
        await self._event.wait()

    def leave(self) -> None:
        """Ends the wait at once. Those behind still wait for those before."""
        self._event.set()

    def end(self) -> None:
        """The turn is over, or will not be used; safe to call twice."""
        self._ended = True
        if self._queue is not None:
            self._queue.advance()


class TurnQueue:
    """First come, first served: a turn comes when all that joined before have ended. Lives on one loop."""

    def __init__(self) -> None:
        self._turns: deque[Turn] = deque()

    def join(self, turn: Turn) -> None:
        """Puts ``turn`` behind all others."""
        turn._queue = self
        self._turns.append(turn)
        self.advance()

    def advance(self) -> None:
        """Drops ended turns from the front and lets the first one come."""
        while self._turns and self._turns[0]._ended:
            self._turns.popleft()
        if self._turns:
            self._turns[0]._event.set()


class Lanes:
    """What the saves of a checkpointer share: the order in which they stage and write, the arenas, and the pipeline
    that writes. Used on one loop only.
    """

    def __init__(self, arenas: Arenas, pipeline: Pipeline | None = None) -> None:
        self.arenas = arenas
        self.pipeline = pipeline or ThreadPipeline()
        self.staging = TurnQueue()
        self.writing = TurnQueue()

    async def prepare(self, slabs: int) -> None:
        """Takes the memory for saves of ``slabs`` slabs, while the pipeline starts."""
        with ungrouped():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.pipeline.start)
                await self.arenas.prepare(slabs)

    async def leave(self) -> None:
        """Ends the pipeline once the saves that are under way have ended; no others come."""
        self.arenas.close()
        last = Turn()
        self.writing.join(last)
        await last.wait()
        await self.pipeline.aclose()
