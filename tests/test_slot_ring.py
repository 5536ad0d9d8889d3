"""The ring of an arena's slots: who gets which, in what order, and what cancellation leaves."""

from __future__ import annotations

import asyncio

import anyio
import anyio.to_thread
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdcp.errors import InvalidOption
from asyncdcp.slot_ring import SlotRing, SlotRingStatistics


@pytest.fixture(params=["asyncio", "trio"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_slabs_take_slots_in_turn(backend: str) -> None:
    async def main() -> None:
        ring = SlotRing(2)
        assert [await ring.acquire(), await ring.acquire()] == [(0, 0), (1, 1)]
        ring.release(0)
        assert await ring.acquire() == (2, 0)
        assert ring.statistics() == SlotRingStatistics(slots=2, in_use=2, peak_in_use=2, waiting=0)

    anyio.run(main, backend=backend)


def test_a_slab_waits_for_its_own_slot_in_order(backend: str) -> None:
    async def main() -> None:
        ring, got = SlotRing(2), []

        async def take(name: str) -> None:
            got.append((name, *await ring.acquire()))

        await ring.acquire()
        await ring.acquire()
        async with anyio.create_task_group() as group:
            for name in "abc":
                group.start_soon(take, name)
                await anyio.wait_all_tasks_blocked()
            ring.release(1)
            await anyio.wait_all_tasks_blocked()
            assert got == []
            assert ring.statistics() == SlotRingStatistics(slots=2, in_use=1, peak_in_use=2, waiting=3)
            ring.release(0)
            await anyio.wait_all_tasks_blocked()
            assert got == [("a", 2, 0), ("b", 3, 1)]
            ring.release(0)
        assert got[-1] == ("c", 4, 0)

    anyio.run(main, backend=backend)


@pytest.mark.parametrize("turn", ["not yet", "given"])
def test_a_cancelled_slab_loses_nothing(backend: str, turn: str) -> None:
    async def main() -> None:
        ring, got = SlotRing(1), []

        async def take(name: str, scope: anyio.CancelScope) -> None:
            with scope:
                got.append((name, *await ring.acquire()))

        await ring.acquire()
        scope = anyio.CancelScope()
        async with anyio.create_task_group() as group:
            group.start_soon(take, "first", scope)
            await anyio.wait_all_tasks_blocked()
            group.start_soon(take, "second", anyio.CancelScope())
            await anyio.wait_all_tasks_blocked()
            if turn == "given":  # too late to cancel: the first one has it
                ring.release(0)
            scope.cancel()
            await anyio.wait_all_tasks_blocked()
            assert ring.statistics().waiting == 1
            ring.release(0)
        assert got == ([("first", 1, 0), ("second", 2, 0)] if turn == "given" else [("second", 1, 0)])

    anyio.run(main, backend=backend)


async def test_a_slab_cancelled_with_its_turn_passes_it_on() -> None:
    ring = SlotRing(1)
    await ring.acquire()
    first = asyncio.create_task(ring.acquire())
    second = asyncio.create_task(ring.acquire())
    await anyio.wait_all_tasks_blocked()
    ring.release(0)
    first.cancel()  # asyncio's own cancellation comes first even where the wait had ended
    assert await second == (1, 0)
    assert first.cancelled()
    assert ring.statistics().waiting == 0


def test_wrong_releases_raise(backend: str) -> None:
    async def main() -> None:
        ring = SlotRing(2)
        with pytest.raises(RuntimeError, match="slot 0"):
            ring.release(0)
        await ring.acquire()
        ring.release(0)
        with pytest.raises(RuntimeError, match="slot 0"):
            ring.release(0)
        for wrong in (-1, 2):
            with pytest.raises(IndexError):
                ring.release(wrong)
        with pytest.raises(RuntimeError, match="thread"):
            await anyio.to_thread.run_sync(ring.release, 0)

    anyio.run(main, backend=backend)


def test_a_ring_has_slots() -> None:
    with pytest.raises(InvalidOption):
        SlotRing(0)


async def test_acquire_nowait_takes_what_is_free_and_passes_nobody() -> None:
    ring = SlotRing(2)
    assert ring.acquire_nowait() == (0, 0)
    assert ring.acquire_nowait() == (1, 1)
    assert ring.acquire_nowait() is None
    got: list[tuple[int, int]] = []

    async def wait() -> None:
        got.append(await ring.acquire())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        ring.release(0)
        assert ring.acquire_nowait() is None, "slot 0 is free, and the one who waits for it is first"
    ring.release(1)
    assert got == [(2, 0)]
    assert ring.acquire_nowait() == (3, 1)


@given(slots=st.integers(1, 4), steps=st.lists(st.integers(0, 5), max_size=40))
def test_whatever_happens_grants_are_gapless_in_order_and_exclusive(slots: int, steps: list[int]) -> None:
    """Steps: 0 release the oldest, 1 the newest; 2 cancel the first waiting, 3 the last; else acquire."""

    async def main() -> None:
        ring, held, granted = SlotRing(slots), [], []
        waiting: dict[int, anyio.CancelScope] = {}

        async def take(number: int) -> None:
            with waiting[number]:
                sequence, slot = await ring.acquire()
                granted.append((number, sequence))
                assert slot == sequence % slots
                assert slot not in held
                held.append(slot)
            del waiting[number]

        async with anyio.create_task_group() as group:
            for number, step in enumerate(steps):
                if step <= 1 and held:
                    ring.release(held.pop(-step))
                elif step in (2, 3) and waiting:
                    waiting[(min if step == 2 else max)(waiting)].cancel()
                elif step >= 4:
                    waiting[number] = anyio.CancelScope()
                    group.start_soon(take, number)
                if step != 1:  # now and then two events before anyone runs
                    await anyio.wait_all_tasks_blocked()
            await anyio.wait_all_tasks_blocked()
            assert ring.statistics().waiting == len(waiting)
            assert ring.statistics().in_use == len(held)
            while waiting:
                ring.release(held.pop(0))
                await anyio.wait_all_tasks_blocked()
        assert [sequence for _, sequence in granted] == list(range(len(granted)))
        assert granted == sorted(granted)

    anyio.run(main, backend="trio")
