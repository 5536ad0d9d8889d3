"""The ring of an arena's slots, without any memory: slab k of the stream of all saves uses slot k mod N, as soon as
that slot was given back.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import anyio

from asyncdcp.errors import InvalidOption


@dataclass(frozen=True)
class SlotRingStatistics:
    """A moment of a ``SlotRing``.

    ``slots`` is their number, ``in_use`` how many are acquired and not released, ``peak_in_use`` the most that ever
    were at one time, ``waiting`` the tasks that wait in ``acquire``.
    """

    slots: int
    in_use: int
    peak_in_use: int
    waiting: int


class SlotRing:
    """Which slab may use which slot: slab ``sequence`` uses slot ``sequence`` mod ``slots``, one slab at a time.

    Pure bookkeeping for one loop's thread, on asyncio and trio. Slabs are granted in the order of the calls, without
    a gap in the sequence; slots may be released in any order, and the next slab waits for *its* slot even where
    others are free, so that every slab's place follows from its number.
    """

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise InvalidOption(f"a ring has at least one slot, not slots={slots}")
        self._used = [False] * slots
        self._in_use = self._peak = self._next = 0
        self._waiters: deque[anyio.Event] = deque()
        self._thread: int | None = None

    async def acquire(self) -> tuple[int, int]:
        """``(sequence, slot)`` of the next slab, once its slot is free; first come, first served.

        Returns without a checkpoint where the slot is free. When cancelled it has acquired nothing, no number is lost,
        and the next in line has the turn.
        """
        self._check_thread()
        if self._waiters or self._head_is_used():
            turn = anyio.Event()
            self._waiters.append(turn)
            try:
                # Whoever is woken is first and finds its slot free: only acquire takes slots, in order.
                await turn.wait()
            except BaseException:
                self._waiters.remove(turn)
                self._wake_first()  # it may have had the turn already
                raise
            self._waiters.popleft()
        return self._grant()

    def acquire_nowait(self) -> tuple[int, int] | None:
        """As ``acquire``, if its slot is free and nobody waits; else None."""
        self._check_thread()
        return None if self._waiters or self._head_is_used() else self._grant()

    def _grant(self) -> tuple[int, int]:
        sequence, slot = self._next, self._next % len(self._used)
        self._next += 1
        self._used[slot] = True
        self._in_use += 1
        self._peak = max(self._peak, self._in_use)
        self._wake_first()
        return sequence, slot

    def release(self, slot: int) -> None:
        """Give ``slot`` back; on the loop's thread only. RuntimeError if nobody has acquired it since its release."""
        self._check_thread()
        if not 0 <= slot < len(self._used):
            raise IndexError(f"slot {slot} of a ring of {len(self._used)}")
        if not self._used[slot]:
            raise RuntimeError(f"slot {slot} was released and is not in use")
        self._used[slot] = False
        self._in_use -= 1
        self._wake_first()

    def statistics(self) -> SlotRingStatistics:
        """How many slots are in use and how many tasks wait, now."""
        return SlotRingStatistics(len(self._used), self._in_use, self._peak, len(self._waiters))

    def _head_is_used(self) -> bool:
        return self._used[self._next % len(self._used)]

    def _wake_first(self) -> None:
        if self._waiters and not self._head_is_used():
            self._waiters[0].set()

    def _check_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.get_ident()
        elif self._thread != threading.get_ident():
            raise RuntimeError("a SlotRing belongs to the thread of the loop that first used it")
