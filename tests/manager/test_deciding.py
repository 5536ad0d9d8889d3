"""The same answer on all ranks, whichever of them knows why."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]  # torch exports them without saying so

from asyncdcp import EverySeconds, EverySteps, OnPreemption
from asyncdcp.engine import Engine
from asyncdcp.errors import PeerFailed
from asyncdcp.manager.deciding import WINDOW, Decider
from asyncdcp.manager.policies import SavePolicy, When
from asyncdcp.manager.preemption import Preemption
from asyncdcp.ranks import StoreRanks


class Job:
    """Ranks on threads, each with its own decider, that go through the same steps at their own pace."""

    def __init__(self, world_size: int, policies: list[SavePolicy], deadline: float = 30.0) -> None:
        store = HashStore()
        self.engines = [Engine(f"rank {rank}") for rank in range(world_size)]
        self.failures: list[str | None] = [None] * world_size
        self.preemptions = [Preemption((signal.SIGUSR1,)) for _ in range(world_size)]
        self.deciders = [
            Decider(
                policies,
                self.preemptions[rank],
                StoreRanks(PrefixStore("job", store), rank, world_size, deadline=deadline),
                self.engines[rank],
                partial(self.failures.__getitem__, rank),
            )
            for rank in range(world_size)
        ]

    def run(self, steps: Any, pause: Any = lambda rank, step: None) -> list[list[tuple[int, str]]]:
        def walk(rank: int) -> list[tuple[int, str]]:
            found = []
            for step in steps:
                pause(rank, step)
                decision = self.deciders[rank].decide(step)
                if decision.save:
                    self.deciders[rank].saved()
                what = [name for name in ("save", "preempted", "failure") if getattr(decision, name)]
                if what:
                    found.append((step, " ".join(what)))
            return found

        with ThreadPoolExecutor(len(self.deciders)) as pool:
            return list(pool.map(walk, range(len(self.deciders))))

    def close(self) -> None:
        for decider, engine in zip(self.deciders, self.engines, strict=True):
            decider.close()
            engine.close(0)


@pytest.fixture
def job() -> Iterator[Any]:
    made: list[Job] = []

    def make(*args: Any, **options: Any) -> Job:
        made.append(Job(*args, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_all_ranks_save_at_the_same_steps(job: Any) -> None:
    """Rank 0 decides by what no other knows; the others run ahead, and lag, as they can."""
    secret = iter([True, False, True, True] + [False] * 100)

    def pause(rank: int, step: int) -> None:
        if step % 5 == rank:
            time.sleep(0.002)

    found = job(3, [EverySteps(50), When(lambda _: next(secret))]).run(range(1, 81), pause)
    assert found[0] == found[1] == found[2]
    assert [step for step, _ in found[0]] == [WINDOW, 3 * WINDOW, 4 * WINDOW, 50]


def test_steps_may_be_far_apart(job: Any) -> None:
    found = job(2, [When(lambda moment: moment.step == 100)]).run(range(0, 400, 100))
    assert found[0] == found[1] == [(200, "save")]


def test_what_rank_0_has_decided_is_told_though_it_is_asked_no_more(job: Any) -> None:
    """Rank 0 is done, or restores, before it has put up the decision for a step that another has yet to come to."""
    made = job(2, [When(lambda moment: True)])
    for decider in made.deciders:
        decider.decide(0)
    begun = made.engines[0].submit(made.deciders[0]._lock.acquire)
    begun.result()
    first = made.deciders[0].decide(100)
    made.deciders[0].begin_anew()
    made.engines[0].call(made.deciders[0]._lock.release)
    assert made.deciders[1].decide(100) == first


def paced(made: Job, on_rank_1: Callable[[], None]) -> Callable[[int, int], None]:
    """Two ranks enter each window together, and find it long enough to be told in, however busy the machine is.
    Something happens on rank 1 at step 20.
    """
    together = threading.Barrier(2)

    def pause(rank: int, step: int) -> None:
        if rank == 1 and step == 20:
            on_rank_1()
        if step % WINDOW == 0:
            if (background := made.deciders[rank]._background) is not None:
                background.wait(30)
            together.wait(30)

    return pause


def test_preemption_of_one_rank_is_that_of_all(job: Any) -> None:
    made = job(2, [OnPreemption((signal.SIGUSR1,))])

    def on_rank_1() -> None:
        made.preemptions[1].heard = time.monotonic()

    found = made.run(range(1, 101), paced(made, on_rank_1))
    assert found[0] == found[1] and len(found[0]) == 1
    step, what = found[0][0]
    assert 20 < step <= 20 + 5 * WINDOW and what == "save preempted"
    assert all(decider.preempted for decider in made.deciders)


def test_a_failure_of_one_rank_surfaces_on_all_at_one_step(job: Any) -> None:
    made = job(2, [EverySteps(1000)])

    def on_rank_1() -> None:
        made.failures[1] = "StorageFull: no space"

    found = made.run(range(1, 101), paced(made, on_rank_1))
    assert found[0] == found[1] and [what for _, what in found[0]] == ["failure"]


def test_a_rank_0_that_is_silent_is_named(job: Any) -> None:
    made = job(2, [EverySeconds(100)], deadline=0.1)
    assert not made.deciders[1].decide(1).save
    with pytest.raises(PeerFailed, match=r"rank 0 did not say within 0\.1 s"):
        made.deciders[1].decide(1 + WINDOW)
