"""Slabs are announced as they fill, in order; however staging is stopped, no copy is under way afterwards."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import anyio
import pytest
import torch
from torch import Tensor

from asyncdcp.errors import Closed, MemoryLimit
from asyncdcp.pipeline.messages import SlabReady
from asyncdcp.planning import SavePlan, Slab, plan_save
from asyncdcp.runs.history import stage_times
from asyncdcp.staging import Arenas, CheckpointStager, EagerBudget, SlabCopier, Sources, StagingArena
from asyncdcp.staging.stager import SLABS_A_TRIP
from asyncdcp.state_dict.flatten import flatten
from asyncdcp.state_dict.structure import describe
from asyncdcp.trace import Trace

SLAB = 64 << 10


def held(tensors: list[torch.Tensor]) -> Sources:
    return Sources(tensors, (), (), EagerBudget(0))


def planned(state: dict[str, Tensor]) -> tuple[SavePlan, list[Tensor]]:
    described = describe(flatten(state))
    return plan_save(described.structure, slab_bytes=SLAB), described.sources


@pytest.fixture
async def arenas() -> AsyncIterator[Arenas]:
    made = Arenas(SLAB, None)
    yield made
    made.close()


async def test_every_slab_is_announced_once_in_order_of_slots(arenas: Arenas) -> None:
    plan, sources = planned({"w": torch.arange(100_000)})
    arena, trace = arenas.acquire(len(plan.slabs)), Trace()
    stager, announced = CheckpointStager(plan, arena, trace), list[SlabReady]()

    async def announce(slab: SlabReady) -> None:
        announced.append(slab)

    await stager.stage(held(sources), announce)
    assert sorted(slab.number for slab in announced) == list(range(len(plan.slabs)))
    assert all(slab.slot == slab.number for slab in announced)
    assert stager.held == set(range(len(plan.slabs)))
    assert stage_times(trace.spans)["stage"].bytes == plan.images[0].size
    image = torch.cat([arena.slot(number) for number in range(arena.slots)])[: plan.images[0].size]
    assert torch.equal(image[len(plan.images[0].header) :].view(torch.int64), torch.arange(100_000))
    for slot in stager.held:
        arena.ring.release(slot)
    arenas.release(arena)


async def test_slabs_go_to_threads_in_batches_that_leave_nobody_idle(
    arenas: Arenas, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, sources = planned({"w": torch.arange(100_000)})  # 13 slabs
    arena, batches = arenas.acquire(len(plan.slabs)), list[int]()
    fill = CheckpointStager._fill_all

    def counted(self: CheckpointStager, copier: SlabCopier, batch: list[tuple[Slab, int]]) -> object:
        batches.append(len(batch))
        return fill(self, copier, batch)

    monkeypatch.setattr(CheckpointStager, "_fill_all", counted)
    stager = CheckpointStager(plan, arena, Trace())

    async def announce(slab: SlabReady) -> None:
        assert slab.slot == slab.number

    await stager.stage(held(sources), announce)
    assert sum(batches) == len(plan.slabs) == 13
    assert max(batches) == SLABS_A_TRIP
    assert min(batches) == 1, "the last ones are shared out"  # threads begin with them in any order
    for slot in stager.held:
        arena.ring.release(slot)
    arenas.release(arena)


async def test_a_ring_waits_for_slots(arenas: Arenas) -> None:
    plan, sources = planned({"w": torch.arange(100_000)})
    arena = arenas.acquire(2)
    stager, seen = CheckpointStager(plan, arena, Trace()), list[int]()

    async def announce(slab: SlabReady) -> None:
        assert bytes(arena.arena.slot(slab.slot)[:8]) == (
            plan.images[0].header[:8] if slab.number == 0 else arena.slot(slab.slot)[:8].numpy().tobytes()
        )
        seen.append(slab.number)
        stager.held.remove(slab.slot)
        arena.ring.release(slab.slot)

    await stager.stage(held(sources), announce)
    assert sorted(seen) == list(range(len(plan.slabs)))
    assert arena.ring.statistics().peak_in_use == 2
    assert not stager.held
    arenas.release(arena)


class StuckCopier:
    """In place of ``SlabCopier.copy``."""

    def __init__(self) -> None:
        self.begun, self.release = threading.Event(), threading.Event()
        self.running = 0

    def __call__(self, *_: object) -> None:
        self.running += 1
        self.begun.set()
        assert self.release.wait(30)
        self.running -= 1


@pytest.mark.parametrize("by", ["scope", "task"])
async def test_cancelled_it_waits_for_copies_and_keeps_their_slots(
    arenas: Arenas, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    stuck = StuckCopier()
    monkeypatch.setattr(SlabCopier, "copy", stuck)
    plan, sources = planned({"w": torch.arange(100_000)})
    arena = arenas.acquire(len(plan.slabs))
    stager, scope = CheckpointStager(plan, arena, Trace()), anyio.CancelScope()

    async def announce(_: SlabReady) -> None:
        pytest.fail("announced though cancelled")

    async def stage() -> None:
        with scope:
            await stager.stage(held(sources), announce)

    task = asyncio.create_task(stage())
    assert await asyncio.to_thread(stuck.begun.wait, 30)
    for _ in range(3):
        scope.cancel() if by == "scope" else task.cancel()
        done, _pending = await asyncio.wait([task], timeout=0.02)
        assert not done
    stuck.release.set()
    await asyncio.wait([task])
    assert task.cancelled() == (by == "task")
    assert stuck.running == 0
    assert stager.held
    assert arena.ring.statistics().in_use == len(stager.held)
    for slot in stager.held:
        arena.ring.release(slot)
    arenas.release(arena)


async def test_a_copy_that_fails_ends_staging(arenas: Arenas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlabCopier, "copy", lambda *_: 1 / 0)
    plan, sources = planned({"w": torch.arange(100_000)})
    arena = arenas.acquire(len(plan.slabs))
    stager = CheckpointStager(plan, arena, Trace())

    async def announce(_: SlabReady) -> None:
        pytest.fail("announced though it failed")

    with pytest.raises(ZeroDivisionError):
        await stager.stage(held(sources), announce)
    arenas.release(arena)


# ── arenas ──


def closed(arena: StagingArena) -> bool:
    return arena.arena.closed


async def test_kept_grown_and_given_back(arenas: Arenas) -> None:
    first = arenas.acquire(2)
    assert arenas.acquire(1) is first
    larger = arenas.acquire(3)
    assert larger is not first
    assert not closed(first)  # two saves use it
    arenas.release(first)
    arenas.release(first)
    assert closed(first)
    arenas.release(larger)
    assert not closed(larger)
    assert arenas.acquire(2) is larger
    arenas.close()
    assert not closed(larger)
    arenas.release(larger)
    assert closed(larger)


async def test_what_was_pending_at_the_close_gives_its_arena_back(arenas: Arenas) -> None:
    arenas.close()
    for _ in range(2):  # the second must not get the first one's, which is closed
        late = arenas.acquire(1)
        late.slot(0).fill_(1)
        arenas.release(late)
        assert late.arena.closed
        with pytest.raises(Closed):
            late.slot(0)


@pytest.mark.parametrize(("limit", "slabs", "slots"), [(1, 5, 1), (3 * SLAB, 5, 3), (3 * SLAB + 1, 2, 2), (None, 5, 5)])
async def test_staging_bytes_bounds_the_slots(limit: int | None, slabs: int, slots: int) -> None:
    arenas = Arenas(SLAB, limit)
    arena = arenas.acquire(slabs)
    assert arena.slots == slots
    arenas.release(arena)
    arenas.close()


async def test_an_abandoned_arena_is_never_acquired_again(arenas: Arenas) -> None:
    stuck = arenas.acquire(2)
    arenas.abandon(stuck)
    assert stuck.abandoned
    other = arenas.acquire(1)
    assert other is not stuck
    arenas.release(other)
    arenas.release(stuck)  # the stuck save ended after all
    assert stuck.arena.closed
    assert not other.arena.closed


async def test_prepare_takes_every_slot_once(arenas: Arenas, monkeypatch: pytest.MonkeyPatch) -> None:
    await arenas.prepare(3)
    arena = arenas.acquire(3)
    taken: list[int] = []
    monkeypatch.setattr(arena.arena, "prefault_slot", taken.append)
    await arenas.prepare(3)
    for slot in range(3):
        arena.prefault(slot)
    assert taken == []
    arenas.release(arena)


async def test_a_prepare_that_fails_leaves_an_arena_that_works(arenas: Arenas, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: StagingArena, number: int) -> None:
        raise MemoryLimit("full")

    with monkeypatch.context() as patch, pytest.raises(MemoryLimit):
        patch.setattr(StagingArena, "prefault", full)
        await arenas.prepare(2)
    arena = arenas.acquire(2)
    assert arena.users == 1
    arenas.release(arena)


def test_views_of_a_closed_arena_hold_its_mapping_and_nothing_else() -> None:
    arena = StagingArena(2, SLAB)
    view = arena.slot(1)
    view.fill_(7)
    arena.close()
    assert arena.arena.closed
    assert bool((view == 7).all())
