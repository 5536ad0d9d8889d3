"""Ranks that settle one save over one storage, on a clock of their own, with everything going wrong that can."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from asyncdcp.envelope import IndexHead, decode_record, digest, encode_index
from asyncdcp.errors import Cancelled, CommitUnknown, StorageError
from asyncdcp.metadata import FileTable, IndexRef
from asyncdcp.names import data_name, index_name, record_name
from asyncdcp.pipeline import records, settle
from asyncdcp.pipeline.commit import State
from asyncdcp.pipeline.messages import SaveJob
from asyncdcp.pipeline.settle import GiveUpSignal, Reason, Settlement
from asyncdcp.planning import plan_save
from asyncdcp.storage import MemoryStorage
from tests.pipeline.forge import SAVE, job_of, structure_of
from tests.virtual import run

RECORD = record_name(SAVE)


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread takes real time, and virtual time would not wait for it."""

    class Inline:
        @staticmethod
        async def run_sync(function: Any, *args: Any) -> Any:
            return function(*args)

    monkeypatch.setattr(settle, "to_thread", Inline)
    monkeypatch.setattr(records, "to_thread", Inline)


class Trouble(MemoryStorage):
    """The shared objects, as one rank sees them: slowly, and failing with ``chance`` for each call."""

    def __init__(self, shared: MemoryStorage, rng: random.Random, chance: float) -> None:
        super().__init__()
        self._objects = shared._objects
        self._rng = rng
        self._chance = chance

    async def _trouble(self) -> None:
        await asyncio.sleep(self._rng.choice((0, 0.01, 0.3)))
        if self._rng.random() < self._chance:
            raise self._rng.choice((StorageError("EIO"), OSError("raw"), TypeError("a bug"), FileNotFoundError("gone")))

    async def claim(self, name: str, data: bytes) -> bool:
        await self._trouble()
        if self._rng.random() < 2 * self._chance:
            if self._rng.random() < 0.5:
                await super().claim(name, data)
            raise CommitUnknown("no answer")
        won = await super().claim(name, data)
        await asyncio.sleep(self._rng.choice((0, 0.2)))
        return won

    async def list(self) -> dict[str, int]:
        await self._trouble()
        return await super().list()

    async def get(self, name: str, limit: int) -> bytes:
        await self._trouble()
        return await super().get(name, limit)

    async def barrier(self) -> None:
        await self._trouble()


@dataclass
class Rank:
    """One rank of the simulation: writes its index at some time, or gives up at some time, before or after."""

    number: int
    job: SaveJob
    storage: Trouble
    signal: GiveUpSignal = field(default_factory=GiveUpSignal)
    state: State | None = None
    durable: bool = False

    async def go(self, rng: random.Random, quits: bool) -> None:
        async with asyncio.TaskGroup() as tasks:
            timer = tasks.create_task(self._quit(rng.choice((0, 0.1, 1, 5)) if quits else 50 + rng.random()))
            await asyncio.sleep(rng.choice((0, 0, 0.1, 2)))
            own = None
            if self.signal.reason is None:
                data = encode_index(IndexHead(SAVE, self.number, 4096, []), bytes(self.job.plan), b"{}", [])
                own = IndexRef(index_name(SAVE, self.number), len(data), digest(data))
                self.storage._objects[own.name] = data
                self.durable = True
            settlement = Settlement(self.job, self.storage, self.signal, own)
            self.state = await settlement.run()
            timer.cancel()

    async def _quit(self, after: float) -> None:
        await asyncio.sleep(after)
        self.signal.set(Reason("cancelled", Cancelled("enough")))


async def simulate(seed: int) -> str:
    rng = random.Random(seed)
    shared, world = MemoryStorage(), rng.randint(1, 4)
    chance = rng.choice((0, 0, 0.02, 0.1, 0.4))
    plan = plan_save(structure_of({}))
    ranks = []
    for n in range(world):
        job = job_of(plan, rank=n, world_size=world)
        ranks.append(Rank(n, job, Trouble(shared, random.Random(rng.random()), chance)))
    async with asyncio.TaskGroup() as tasks:
        for rank in ranks:
            tasks.create_task(rank.go(rng, quits=rng.random() < 0.2))
    states = {rank.state for rank in ranks}
    data = shared._objects.get(RECORD)
    outcome = decode_record(data, RECORD).outcome if data else "none"
    # All that know agree, with each other and with the Record.
    if State.COMMITTED in states:
        assert outcome == "commit"
    if State.ABORTED in states:
        assert outcome == "abort"
    if State.FAILED in states:
        assert outcome != "commit"
    if outcome == "commit":
        assert all(rank.durable for rank in ranks)
        assert states <= {State.COMMITTED, State.UNKNOWN}
    assert None not in states
    if chance == 0:
        assert states in ({State.COMMITTED}, {State.ABORTED})
    return outcome


@pytest.mark.parametrize("block", range(5))
def test_ranks_agree_whatever_happens(block: int) -> None:
    outcomes = []

    async def main() -> None:
        outcomes.extend([await simulate(seed) for seed in range(block * 100, block * 100 + 100)])

    run(main())
    assert {"commit", "abort"} <= set(outcomes)


def settled(
    storage: MemoryStorage, *, rank: int = 0, world: int = 1, quits: bool = False
) -> tuple[Settlement, GiveUpSignal]:
    plan = plan_save(structure_of({}))
    data = encode_index(IndexHead(SAVE, rank, 4096, []), plan.index_plan, b"{}", [])
    own = IndexRef(index_name(SAVE, rank), len(data), digest(data))
    storage._objects[own.name] = data
    signal = GiveUpSignal()
    if quits:
        signal.set(Reason("cancelled", Cancelled("enough")))
    return Settlement(job_of(plan, rank=rank, world_size=world), storage, signal, own), signal


def test_a_commit_of_something_else_is_not_taken_for_ours() -> None:
    async def main() -> None:
        storage = MemoryStorage()
        other, _ = settled(storage)
        assert await other.run() is State.COMMITTED
        for rank in (0, 1):
            late, signal = settled(storage, rank=rank, world=2)
            late._own = IndexRef(index_name(SAVE, rank), 1, "other bytes")
            assert await late.run() is State.UNKNOWN
            assert signal.reason and "something else" in str(signal.reason.error)

    run(main())


def test_the_committer_refuses_what_a_reader_would() -> None:
    async def main() -> None:
        plan = plan_save(structure_of({"w": np.zeros(3)}))
        table = [FileTable(data_name(SAVE, 1, 0), plan.images[0].size, bytes(16))]
        head = IndexHead(SAVE, 1, 4096, [])
        for data, fault in (
            (encode_index(IndexHead(SAVE, 0, 4096, []), plan.index_plan, b"{}", table), "another save or rank"),
            (encode_index(head, plan.index_plan, b"{}", table)[:-1], "envelope"),
            (encode_index(head, plan.index_plan, b"{}", []), "differ in number"),
            (encode_index(head, plan.index_plan, b"{}", table), "is missing"),
        ):
            storage = MemoryStorage()
            settlement, signal = settled(storage, world=2)
            storage._objects[index_name(SAVE, 1)] = data
            assert await settlement.run() is State.ABORTED
            assert signal.reason and fault in str(signal.reason.error)
            assert settlement.record and fault in str(settlement.record.cause)

    run(main())


@pytest.mark.parametrize("message", ["cannot write there/\udcff", "!" * (80 << 20)], ids=["not UTF-8", "long"])
@pytest.mark.parametrize("rank", [0, 1])
def test_whatever_is_wrong_the_others_are_told(message: str, rank: int) -> None:
    async def main() -> None:
        storage = MemoryStorage()
        settlement, signal = settled(storage, rank=rank, world=2)
        signal.set(Reason("failed", StorageError(message)))
        assert await settlement.run() is State.ABORTED
        peer, _ = settled(storage, rank=1 - rank, world=2)
        assert await peer.run() is State.ABORTED
        assert peer.record and str(peer.record.cause).startswith(f"failed: {message[:10]}")

    run(main())


def test_a_full_disk_still_reads_the_others_abort() -> None:
    """Who can no longer write finds out by reading how the save ended."""

    class Full(MemoryStorage):
        async def claim(self, name: str, data: bytes) -> bool:
            raise StorageError("full")

    async def main() -> None:
        shared = MemoryStorage()
        first, _ = settled(shared, world=2, quits=True)
        assert await first.run() is State.ABORTED
        full = Full()
        full._objects = shared._objects
        peer, _ = settled(full, rank=1, world=2, quits=True)
        assert await peer.run() is State.ABORTED
        del shared._objects[RECORD]
        alone, _ = settled(full, rank=1, world=2, quits=True)
        assert await alone.run() is State.UNKNOWN

    run(main())
