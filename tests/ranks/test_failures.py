"""What becomes of a save of several ranks when one of them fails, lags, dies or wakes up too late."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncdcp import AESGCM, AsyncCheckpointer, MemoryStorage, Options, SoleRank
from asyncdcp.checkpointer import agreements
from asyncdcp.errors import (
    AsyncDCPError,
    Cancelled,
    CheckpointNotFound,
    DeadlineExceeded,
    InvalidOption,
    PeerFailed,
    SaveSkipped,
    StorageError,
    UnsupportedValue,
    UsageError,
)
from asyncdcp.ranks import StoreRanks
from asyncdcp.storage.port import Buffer
from tests.ranks.conftest import Job, late_ranks, make_ranks, rows
from tests.work import let_pass

Jobs = Callable[..., Job]
WHOLE = torch.arange(40.0).view(8, 5)
KEY = bytes(range(32))


class Shared(MemoryStorage):
    """One place in memory that all ranks see, each through an instance of its own whose operations may be held up.

    ``hold[operation]`` is waited for before the operation, ``errors[operation]`` is raised by it. ``reached`` is set by
    what is held up, ``told`` when the rank's Index is there.
    """

    def __init__(self, whole: MemoryStorage | None = None) -> None:
        super().__init__("shared")
        if whole is not None:
            self._objects, self._unfinished = whole._objects, whole._unfinished
        self.hold: dict[str, threading.Event] = {}
        self.errors: dict[str, Exception] = {}
        self.reached, self.told = threading.Event(), threading.Event()

    async def _pass(self, operation: str) -> None:
        if operation in self.hold:
            self.reached.set()
            await asyncio.to_thread(self.hold[operation].wait, 30)
        if operation in self.errors:
            raise self.errors[operation]

    async def create(self, name: str, length_hint: int) -> Any:
        await self._pass("create")
        return await super().create(name, length_hint)

    async def put(self, name: str, data: Buffer | bytes) -> None:
        if name.endswith(".index.json"):
            await self._pass("index")
        if name.endswith(".probe"):
            await self._pass("probe")
        await super().put(name, data)  # type: ignore[arg-type]  # bytes, as the port says
        if name.endswith(".index.json"):
            self.told.set()

    async def claim(self, name: str, data: bytes) -> bool:
        if "-" not in name and name.endswith(".json"):
            await self._pass("claim")
        return await super().claim(name, data)


def state(rank: int, world_size: int = 3) -> dict[str, Any]:
    return {"weight": rows(WHOLE, rank, world_size), "step": 1}


def places(world_size: int) -> list[Shared]:
    first = Shared()
    return [first, *(Shared(first) for _ in range(world_size - 1))]


def start(job: Job, where: list[Shared]) -> list[Any]:
    handles = job.each(lambda each, rank: each.save(where[rank], state(rank, len(where))))
    for handle in handles:
        assert not isinstance(handle, BaseException), handle
    return handles


def miss_the_deadline(job: Job) -> None:
    for each in job.checkpointers:
        let_pass(each._engine, each._options.save_deadline)


def outcomes(handles: list[Any]) -> list[Any]:
    return [handle.exception(30) for handle in handles]


def loads(where: Shared) -> bool:
    with AsyncCheckpointer(process=False, process_group=SoleRank()) as alone:
        try:
            return torch.equal(alone.load(where).result()["weight"], WHOLE)
        except CheckpointNotFound:
            return False


@pytest.mark.parametrize("operation", ["create", "index"])
@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_whose_storage_fails_is_named_on_all_others(job: Jobs, operation: str, failing: int) -> None:
    three, where = job(3), places(3)
    where[failing].errors[operation] = StorageError("the disk is gone", errno=5)
    for rank, error in enumerate(outcomes(start(three, where))):
        if rank == failing:
            assert isinstance(error, StorageError)
        else:
            assert isinstance(error, PeerFailed) and error.rank == failing
            assert f"rank {failing} gave the save up: failed: the disk is gone" in str(error)
    assert not loads(where[0])
    following = places(3)
    assert outcomes(start(three, following)) == [None] * 3
    assert loads(following[0])


@pytest.mark.parametrize("cancelled", [0, 1])
def test_a_cancelled_save_ends_alike_on_all_ranks(job: Jobs, cancelled: int) -> None:
    three, where = job(3), places(3)
    held = where[cancelled].hold["index"] = threading.Event()
    handles = start(three, where)
    assert where[cancelled].reached.wait(30)
    handles[cancelled].cancel()
    held.set()
    errors = outcomes(handles)
    if errors[cancelled] is None:  # it came too late
        assert errors == [None] * 3 and loads(where[0])
        return
    assert isinstance(errors[cancelled], Cancelled)
    for rank, error in enumerate(errors):
        if rank != cancelled:
            assert isinstance(error, PeerFailed) and error.rank == cancelled
    assert not loads(where[0])


def test_one_that_is_cancelled_while_it_is_planned_goes_no_further(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is made on a thread, which is not cut short."""
    two, where = job(2), places(2)
    planner, lanes = two.checkpointers[1]._planner, two.checkpointers[1]._lanes
    begun, release, plan, acquired = threading.Event(), threading.Event(), planner.plan, list[int]()

    def slow(structure: Any) -> Any:
        begun.set()
        assert release.wait(30)
        return plan(structure)

    monkeypatch.setattr(planner, "plan", slow)
    monkeypatch.setattr(lanes.arenas, "acquire", acquired.append)
    handles = start(two, where)
    assert begun.wait(30)
    handles[1].cancel()
    release.set()
    first, second = outcomes(handles)
    assert isinstance(first, PeerFailed) and first.rank == 1 and isinstance(second, Cancelled)
    assert not acquired and not loads(where[0])
    monkeypatch.undo()
    again = places(2)
    assert outcomes(start(two, again)) == [None, None] and loads(again[0])


@pytest.mark.parametrize("stuck", [0, 1])
def test_a_rank_that_never_writes_is_named_when_the_deadline_passes(job: Jobs, stuck: int) -> None:
    three, where = job(3), places(3)
    held = where[stuck].hold["create"] = threading.Event()
    handles = start(three, where)
    for rank, place in enumerate(where):
        assert (place.reached if rank == stuck else place.told).wait(30)
    miss_the_deadline(three)
    errors = [handle.exception(30) for rank, handle in enumerate(handles) if rank != stuck]
    for error in errors:
        assert isinstance(error, PeerFailed) and error.rank == stuck, error
        assert f"rank {stuck} was waited for in vain: deadline: " in str(error)
    held.set()  # it wakes up, and would go on
    assert isinstance(handles[stuck].exception(30), AsyncDCPError)
    assert not loads(where[0])


def test_a_storage_that_hangs_before_anything_is_agreed_ends_in_time(job: Jobs) -> None:
    two, where = job(2, agreement_deadline=0.2), places(2)
    for each in two.ranks:
        each.deadline = 0.2  # from here on: making a checkpointer is an agreement, too
    held = where[0].hold["probe"] = threading.Event()
    first, second = start(two, where)
    assert where[0].reached.wait(30)
    assert isinstance(second.exception(30), PeerFailed) and second.exception().rank == 0
    let_pass(two.checkpointers[0]._engine, 2 * Options().settle_seconds)
    assert isinstance(first.exception(30), DeadlineExceeded)
    held.set()


def test_a_zombie_that_wakes_up_late_changes_nothing(job: Jobs) -> None:
    """The committer hangs before its claim; the others give up and the job is started again; then it wakes."""
    two, where = job(2), places(2)
    held = where[0].hold["claim"] = threading.Event()
    handles = start(two, where)
    assert where[0].reached.wait(30)
    miss_the_deadline(two)
    error = handles[1].exception(30)
    assert isinstance(error, PeerFailed) and error.rank == 0 and "rank 0 was to commit" in str(error)
    again = [Shared(where[0]), Shared(where[0])]
    assert outcomes(start(job(2), again)) == [None] * 2
    before = dict(where[0]._objects)
    held.set()
    assert isinstance(handles[0].exception(30), AsyncDCPError)
    assert before.items() >= {**where[0]._objects}.items()  # it removed what it had written, and nothing else
    assert loads(where[0])


def test_a_skipped_save_is_skipped_everywhere(job: Jobs) -> None:
    two, where = job(2, when_busy="skip"), places(2)
    held = where[0].hold["create"] = threading.Event()
    handles = start(two, where)
    other = places(2)
    skipped = [
        two.checkpointers[0].save(other[0], state(0, 2)),
        two.checkpointers[1].save(other[1], state(1, 2)),
    ]
    assert all(isinstance(error, SaveSkipped) for error in outcomes(skipped))
    held.set()
    assert outcomes(handles) == [None, None]


def test_ranks_that_save_to_different_places_are_told_so(
    job: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreements, "_LOOKS", (0.0, 0.01))
    errors = job(2).each(lambda each, rank: each.save(tmp_path / str(rank), state(rank, 2)).result(30))
    assert all("all ranks must give one path" in str(error) for error in errors)
    unshared = [MemoryStorage("here"), MemoryStorage("here")]
    errors = job(2).each(lambda each, rank: each.save(unshared[rank], state(rank, 2)).result(30))
    assert all("is not there on this rank" in str(error) for error in errors)


@pytest.mark.parametrize("extensions", [([AESGCM(KEY)], []), ([], [AESGCM(KEY)]), ([AESGCM(KEY)], [AESGCM(KEY[::-1])])])
def test_ranks_that_encrypt_in_different_ways_are_told_so(
    everywhere: Any, tmp_path: Path, extensions: tuple[list[AESGCM], list[AESGCM]]
) -> None:
    """Nobody could load what they would commit."""

    def save(ranks: StoreRanks) -> None:
        with AsyncCheckpointer(process=False, process_group=ranks, extensions=extensions[ranks.rank]) as checkpointer:
            checkpointer.save(tmp_path / "a", state(ranks.rank, 2)).result(30)

    for error in everywhere(save, make_ranks(2)):
        assert isinstance(error, InvalidOption) and "all ranks must give the same extensions" in str(error), error


def test_a_checkpointer_that_only_one_rank_makes_is_an_error_in_time() -> None:
    ranks = late_ranks(2, [0])
    with pytest.raises(PeerFailed, match="rank 1 did not come to the agreement on the making of a checkpointer"):
        AsyncCheckpointer(process=False, process_group=ranks[0])


def test_without_a_process_group_a_launched_process_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="init_process_group"):
        AsyncCheckpointer(process=False)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_load_that_one_rank_refuses_is_refused_to_all_at_once(job: Jobs, tmp_path: Path, victim: int) -> None:
    two = job(2)
    assert not any(isinstance(each, Exception) for each in two.save(tmp_path / "a", lambda rank: state(rank, 2)))
    found = two.load(tmp_path / "a", lambda rank: state(rank, 2) | ({"y": object()} if rank == victim else {}))
    assert isinstance(found[victim], UnsupportedValue)
    other = found[1 - victim]
    assert isinstance(other, PeerFailed) and other.rank == victim and "'y' is a builtins.object" in str(other)
    again = two.load(tmp_path / "a", lambda rank: state(rank, 2))
    assert not any(isinstance(each, Exception) for each in again), again
