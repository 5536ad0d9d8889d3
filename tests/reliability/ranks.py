"""Several ranks settle saves over one simulated disk, on a virtual clock, with everything going wrong that can.

A seed decides all of it: how many ranks, who is slow, late, killed, cancelled or out of time, whose trainer gives up on
a worker that goes on, whether another job saves to the same path meanwhile. The writer, the settlement and the storage
are the real ones.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any, Final

from asyncdcp.errors import AmbiguousCheckpoint, AsyncDCPError, Cancelled, CommitUnknown, DeadlineExceeded
from asyncdcp.names import make_save_id
from asyncdcp.pipeline.records import read_records
from asyncdcp.pipeline.settle import Reason
from asyncdcp.testing.power import remains
from asyncdcp.worker.fence import settle_without_worker
from tests.pipeline.forge import job_of, plan_of, writer_of
from tests.reliability.simulation import simulated
from tests.reliability.worlds import ENDLESS, NOTHING, Lost, ProcessStorage, World, state, structure, version_at
from tests.virtual import run

LONGEST: Final = 20_000.0
"""Virtual seconds after which a rank that has not come to an end hangs."""


@dataclass
class Job:
    """One save by all its ranks; ``version`` is what it saves. ``committed`` and ``given_up`` name who said so."""

    world: World
    rng: random.Random
    version: int
    ranks: int
    trouble: float
    committed: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    killed: bool = False

    @property
    def save_id(self) -> str:
        return make_save_id("run", "here", self.version)

    async def go(self) -> None:
        await asyncio.gather(*(self._rank(rank) for rank in range(self.ranks)))

    def _happens(self) -> bool:
        return self.rng.random() < self.trouble

    async def _rank(self, rank: int) -> None:
        await asyncio.sleep(self.rng.choice((0, 0, 0.1, 3, 40)))
        budget = self.rng.randrange(1, 40) if self._happens() else ENDLESS
        deadline = self.rng.choice((1.0, 10.0, 60.0)) if self._happens() else 900.0
        self.killed |= budget != ENDLESS
        storage = self.world.storage(budget)
        shape = structure(rank, self.ranks)
        options: dict[str, Any] = {"save_id": self.save_id, "rank": rank, "world_size": self.ranks, "overwrite": True}
        writer, _ = writer_of(storage, state(self.version), structure=shape, deadline=deadline, **options)
        parts = [self._settled(f"rank {rank}", writer.run(), storage)]
        if self._happens():
            reason = Reason("cancelled", Cancelled("enough"))
            asyncio.get_running_loop().call_later(self.rng.choice((0, 0.5, 8, 30)), writer.give_up.set, reason)
        if self._happens():
            late = Reason("deadline", DeadlineExceeded("the worker does not answer"))
            trainer = self.world.storage()
            job = job_of(plan_of(shape), deadline=deadline, **options)
            fence = self._later(settle_without_worker(job, trainer, late, dead=False))
            parts.append(self._settled(f"trainer of rank {rank}", fence, trainer))
        await asyncio.gather(*parts)

    async def _later(self, work: Any) -> None:
        await asyncio.sleep(self.rng.choice((0, 1, 10, 60)))
        await work

    async def _settled(self, who: str, work: Any, storage: ProcessStorage) -> None:
        try:
            async with asyncio.timeout(LONGEST):
                await work
        except CommitUnknown:
            self.unknown.append(who)
        except AsyncDCPError:
            if storage.process.alive:  # the dead say nothing
                self.given_up.append(who)
        except TimeoutError as error:
            raise Lost(f"{who} hangs") from error
        else:
            self.committed.append(who)


async def play(seed: int) -> str:
    """One seed; how it ended. Raises ``Lost`` for a broken promise."""
    rng = random.Random(seed)
    world = World(ranks=rng.randint(1, 4))
    before = NOTHING
    if rng.random() < 0.7:
        await world.save()
        before = 1
    trouble = rng.choice((0.0, 0.1, 0.3))
    jobs = [Job(world, rng, 2, world.ranks, trouble)]
    if rng.random() < 0.25:
        jobs.append(Job(world, rng, 3, rng.randint(1, 2), trouble))
    await asyncio.gather(*(job.go() for job in jobs))
    records = {record.save_id: record.outcome for record in await _records(world)}
    for job in jobs:
        replaced = any(other.committed for other in jobs if other is not job)
        _check_agreement(job, records.get(job.save_id), replaced=replaced)
    if trouble == 0 and len(jobs) == 1 and not jobs[0].committed:
        raise Lost("nothing went wrong, and nothing was committed")
    await _check_what_is_left(world, jobs, before)
    return "two" if len(jobs) > 1 else "commit" if jobs[0].committed else "abort"


async def _records(world: World) -> list[Any]:
    storage = world.storage()
    return await read_records(storage, await storage.list())


def _check_agreement(job: Job, outcome: str | None, *, replaced: bool) -> None:
    """All that know agree, with each other and with the Record.

    Another job's save may have replaced a commit, and deleted it. Whoever then claims an abort of it gets the free
    name, and is told that the save was given up; its checkpoint is gone indeed.
    """
    said = f"{job.committed} said committed, {job.given_up} given up, {job.unknown} unknown; the Record: {outcome}"
    if replaced and outcome != "commit":
        return
    if job.committed and job.given_up:
        raise Lost(said)
    if (job.committed and outcome == "abort") or (job.given_up and outcome == "commit"):
        raise Lost(said)


async def _check_what_is_left(world: World, jobs: list[Job], before: int) -> None:
    """Now, and after a loss of power."""
    acknowledged = {job.version for job in jobs if job.committed}
    possible = acknowledged or {before, *(job.version for job in jobs if not job.given_up)}
    if len(jobs) > 1:
        possible |= {job.version for job in jobs if not job.given_up}
    if world.disk.open_files and not any(job.killed for job in jobs):
        raise Lost(f"left open: {world.disk.open_files}")
    for image in (world.disk.image(), *remains(world.disk, 4)):
        found = await _found(image)
        if found not in possible and not (found == AMBIGUOUS and len(jobs) > 1):
            raise Lost(f"found {found}, not one of {sorted(possible)}")


AMBIGUOUS: Final = -1


async def _found(image: Any) -> int:
    world = World()
    world.disk = type(world.disk)(image)
    try:
        return await version_at(world.storage(), ambiguous=True)
    except AmbiguousCheckpoint:
        return AMBIGUOUS


def simulate(seed: int) -> str:
    """As ``play``, without threads and without real time; the error says which seed replays it."""
    try:
        with simulated(random.Random(seed)):
            return run(play(seed))
    except Lost as error:
        raise Lost(f"seed {seed}: {error}") from error
