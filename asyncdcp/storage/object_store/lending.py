"""Memory lent to obstore, and when it comes back.

obstore sends a buffer as it lies, without a copy, and keeps it until its part has been sent or given up. When that was
no call tells; but the buffer protocol does: each part is lent as an object of its own, which ends with its last user.
"""

from __future__ import annotations

import asyncio
import ctypes
import weakref
from collections import deque
from contextlib import suppress


class GivenUp(Exception):
    """What the upload is ended by, so that obstore aborts it."""


class Parts:
    """The parts of an upload, as obstore iterates over them. Lives on one asyncio loop.

    ``lent`` counts those that were given and have not come back. obstore has no more than ``limit`` of them at once: so
    it always asks for the next one, which is where it hears that the upload is given up.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._queue: deque[memoryview] = deque()
        self._more = asyncio.Event()
        self._back = asyncio.Event()
        self._ended = False
        self._given_up = False
        self.lent = 0
        self.asked = False
        """Whether obstore has taken a part; until then the upload can be begun anew."""

    def lend(self, part: memoryview) -> asyncio.Event:
        """Gives a part away, which must stay as it is until the event is set: nobody uses it then."""
        back = asyncio.Event()
        memory = (ctypes.c_ubyte * len(part)).from_buffer(part)
        # Weak references to the array end before it lets go of the part; those to its view of the part end after that.
        [view] = (memory._objects or {}).values()
        weakref.finalize(view, self._on_end, back).atexit = False
        del view
        self.lent += 1
        self._queue.append(memoryview(memory).cast("B"))
        self._more.set()
        return back

    def end(self) -> None:
        """There are no more parts."""
        self._ended = True
        self._more.set()

    def give_up(self) -> None:
        """Ends the upload where obstore still asks for parts. Those that it has not asked for come back."""
        self._given_up = True
        self._queue.clear()
        self._more.set()

    async def wait_back(self) -> None:
        """Until another part has come back."""
        self._back.clear()
        await self._back.wait()

    def wake(self) -> None:
        """Ends ``wait_back``, for whoever has to look at something else."""
        self._back.set()

    def _on_end(self, back: asyncio.Event) -> None:
        """On any thread."""
        with suppress(RuntimeError):  # the loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(self._came_back, back)

    def _came_back(self, back: asyncio.Event) -> None:
        self.lent -= 1
        back.set()
        self._back.set()
        self._more.set()

    # ── as obstore iterates ──

    def __aiter__(self) -> Parts:
        return self

    async def __anext__(self) -> memoryview:
        while not self._queue or self.lent - len(self._queue) >= self._limit:
            if self._given_up:
                raise GivenUp
            if self._ended and not self._queue:
                raise StopAsyncIteration
            self._more.clear()
            await self._more.wait()
        self.asked = True
        return self._queue.popleft()
