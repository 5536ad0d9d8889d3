"""What is cancelled or refused on one rank: the others hear of it at once, and the next call is a new beginning."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]  # torch exports them without saying so

from asyncdcp import CheckpointManager
from asyncdcp.errors import Cancelled, InvalidOption, PeerFailed, UsageError
from asyncdcp.ranks import StoreRanks

WORLD, LONG = 2, 30.0


class Slow:
    """Its ``load_state_dict`` waits for the test, once, and tells that it has begun."""

    def __init__(self) -> None:
        self.begun, self.goes_on = threading.Event(), threading.Event()
        self.loads = 0

    def state_dict(self) -> dict[str, Any]:
        return {"x": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begun.set()
        assert self.goes_on.wait(LONG)
        self.loads += 1


class Job:
    """Two ranks, whose agreements wait longer than the test would."""

    def __init__(self, run: Path) -> None:
        store = HashStore()
        ranks = [StoreRanks(PrefixStore("job", store), rank, WORLD, deadline=2 * LONG) for rank in range(WORLD)]
        self.pool = ThreadPoolExecutor(WORLD)
        self.states = [Slow() for _ in ranks]
        self.managers: list[CheckpointManager] = list(
            self.pool.map(lambda each: CheckpointManager(run, process=False, process_group=each), ranks)
        )
        for manager in self.managers:
            manager.open()

    def each(self, function: Any) -> list[Any]:
        return list(self.pool.map(function, range(WORLD)))

    def restore(self, rank: int) -> Any:
        return self.managers[rank].restore_latest({"s": self.states[rank]})


@pytest.fixture
def job(run: Path) -> Any:
    made = Job(run)
    made.each(lambda rank: made.restore(rank).result(LONG))
    made.each(lambda rank: made.managers[rank].save(1, {"s": Slow()}).result(LONG))
    yield made
    for state in made.states:
        state.goes_on.set()
    made.each(lambda rank: made.managers[rank].close())
    made.pool.shutdown()


@pytest.mark.parametrize("victim", range(WORLD))
def test_before_it_has_begun(job: Job, victim: int) -> None:
    begins = threading.Event()
    job.managers[victim]._engine.call(begins.wait, LONG)
    alone = job.restore(victim)
    alone.cancel()
    begins.set()
    assert isinstance(alone.exception(LONG), Cancelled)
    error = job.restore(1 - victim).exception(LONG)
    assert isinstance(error, PeerFailed) and error.rank == victim
    _go_on(job)


@pytest.mark.parametrize("victim", range(WORLD))
def test_while_it_waits_for_the_others(job: Job, victim: int) -> None:
    alone = job.restore(victim)
    job.managers[victim].steps().result(LONG)  # the loop has gone on: it has begun
    alone.cancel()
    assert isinstance(alone.exception(LONG), Cancelled)
    error = job.restore(1 - victim).exception(LONG)
    assert isinstance(error, PeerFailed) and error.rank == victim
    _go_on(job)


@pytest.mark.parametrize("victim", range(WORLD))
def test_while_it_loads(job: Job, victim: int) -> None:
    futures = [job.restore(rank) for rank in range(WORLD)]
    assert all(state.begun.wait(LONG) for state in job.states)
    futures[victim].cancel()
    job.managers[victim].steps().result(LONG)
    assert not futures[victim].done()  # what loads still uses the state
    for state in job.states:
        state.goes_on.set()
    assert isinstance(futures[victim].exception(LONG), Cancelled)
    error = futures[1 - victim].exception(LONG)
    assert isinstance(error, PeerFailed) and error.rank == victim
    _go_on(job)


@pytest.mark.parametrize("victim", range(WORLD))
def test_a_wait(job: Job, victim: int) -> None:
    """It is out of step with nothing after it, either."""
    begins = threading.Event()
    job.managers[victim]._engine.call(begins.wait, LONG)
    alone = job.managers[victim].wait()
    alone.cancel()
    begins.set()
    assert isinstance(alone.exception(LONG), Cancelled)
    error = job.managers[1 - victim].wait().exception(LONG)
    assert isinstance(error, PeerFailed) and error.rank == victim
    for _ in range(3):
        assert job.each(lambda rank: job.managers[rank].wait().result(LONG)) == [None] * WORLD
    _go_on(job)


@pytest.mark.parametrize("victim", range(WORLD))
def test_a_save_whose_metrics_are_refused(job: Job, victim: int) -> None:
    wrong: Any = {"loss": "low"}
    with pytest.raises(InvalidOption, match=r"metrics\['loss'\]"):
        job.managers[victim].save(2, {"s": job.states[victim]}, metrics=wrong)
    error = job.managers[1 - victim].save(2, {"s": job.states[1 - victim]}).exception(LONG)
    assert isinstance(error, PeerFailed) and error.rank == victim
    assert job.each(lambda rank: job.managers[rank].save(2, {"s": Slow()}).result(LONG).tensors) == [0, 0]


def _go_on(job: Job) -> None:
    """Several times, for what was left behind may be met later."""
    for state in job.states:
        state.goes_on.set()
    for _ in range(3):
        found: list[Any] = job.each(lambda rank: job.restore(rank).result(LONG))
        assert [each.step for each in found] == [1, 1]
    loads = [state.loads for state in job.states]
    assert min(loads) >= 3


@pytest.mark.parametrize("victim", range(WORLD))
def test_a_save_before_a_restore_is_over_there(job: Job, victim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.managers[victim], "_is_restoring", lambda: True)
    with pytest.raises(UsageError, match="a restore is under way"):
        job.managers[victim].save(2, {"s": job.states[victim]})
    monkeypatch.undo()
    error = job.managers[1 - victim].save(2, {"s": job.states[1 - victim]}).exception(LONG)
    assert isinstance(error, PeerFailed) and error.rank == victim
    assert job.each(lambda rank: job.managers[rank].save(2, {"s": Slow()}).result(LONG).tensors) == [0, 0]
