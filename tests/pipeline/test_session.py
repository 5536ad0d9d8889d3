from __future__ import annotations

import asyncio

import numpy as np
import pytest

from asyncdcp.arena import Arena
from asyncdcp.errors import Cancelled
from asyncdcp.pipeline.messages import SlabReady
from asyncdcp.pipeline.session import LocalSession, SessionRequest
from asyncdcp.planning import plan_save
from asyncdcp.storage import LocalStorage, MemoryStorage
from asyncdcp.trace import Trace
from tests.pipeline.forge import SLAB, Arrays, images_of, job_of, parts_of, read_all, structure_of

ARRAYS: Arrays = {"w": np.arange(50_001, dtype=np.float32)}


async def test_slabs_pass_through_a_ring_of_two_slots(tmp_path: object) -> None:
    """Each slot is filled again as soon as it is given back, and padded in place for direct I/O."""
    plan = plan_save(structure_of(ARRAYS), slab_bytes=SLAB)
    (image,) = images_of(plan, parts_of(plan, ARRAYS))
    arena, free = Arena(2, SLAB), asyncio.Queue[int]()
    storage = LocalStorage(str(tmp_path))
    session = LocalSession(SessionRequest(job_of(plan), storage, arena, free.put_nowait, Trace()))
    free.put_nowait(0)
    free.put_nowait(1)

    async def stage() -> None:
        for slab in plan.slabs:
            slot = await free.get()
            arena.slot(slot)[: slab.length] = image[slab.begin : slab.begin + slab.length]
            await session.announce(SlabReady(0, slab.begin // SLAB, slot, slab.length))
        await session.staging_done()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(stage())
        saved = await session.run()
    arena.close()
    assert saved.stored_bytes == len(image) and len(plan.slabs) > 10
    assert free.qsize() == 2
    assert np.array_equal((await read_all(storage))["w"], ARRAYS["w"])


async def test_giving_up_ends_a_save_whose_staging_never_ends() -> None:
    plan = plan_save(structure_of(ARRAYS), slab_bytes=SLAB)
    arena, storage = Arena(1, SLAB), MemoryStorage()
    session = LocalSession(SessionRequest(job_of(plan), storage, arena, lambda _: None, Trace()))
    asyncio.get_running_loop().call_soon(session.give_up, "cancelled", Cancelled("enough"))
    with pytest.raises(Cancelled, match="enough"):
        await session.run()
    arena.close()
    assert not storage._unfinished
