"""When to save: policies, preemption, and the same answer on all ranks."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]  # torch exports them without saying so

from asyncdcp import CheckpointManager, EverySeconds, EverySteps, OnPreemption
from asyncdcp.engine import Engine
from asyncdcp.errors import InvalidOption, PeerFailed
from asyncdcp.manager.deciding import WINDOW, Decider
from asyncdcp.manager.policies import Moment, SavePolicy, When, check_policies
from asyncdcp.manager.preemption import Preemption
from asyncdcp.ranks import SoleRank, StoreRanks
from tests.manager.conftest import Opened, Training


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine("test")
    yield made
    made.close(0)


def test_policies() -> None:
    assert [step for step in range(1, 10) if EverySteps(3).due(Moment(step, 0.0, False))] == [3, 6, 9]
    assert [EverySeconds(5).due(Moment(1, seconds, False)) for seconds in (4.9, 5.0)] == [False, True]
    assert OnPreemption().due(Moment(1, 0.0, True))
    one, two = check_policies([EverySteps(2), lambda moment: moment.step == 7])
    assert (one.by_step, two.by_step, two.due(Moment(7, 0.0, False))) == (True, False, True)
    for wrong in (
        lambda: EverySteps(0),
        lambda: EverySeconds(0),
        lambda: OnPreemption(()),
        lambda: OnPreemption(deadline=0),
    ):
        with pytest.raises(InvalidOption):
            wrong()


def test_alone_it_is_decided_at_once(engine: Engine) -> None:
    policies = check_policies([EverySteps(10), lambda moment: moment.step in (3, 4)])
    decider = Decider(policies, None, SoleRank(), engine, lambda: None)
    assert [step for step in range(1, 21) if decider.decide(step).save] == [3, 4, 10, 20]


def test_seconds_count_from_the_last_save(engine: Engine) -> None:
    seen: list[float] = []

    def look_on(moment: Moment) -> bool:
        seen.append(moment.seconds)
        return False

    decider = Decider([When(look_on)], None, SoleRank(), engine, lambda: None)
    decider.decide(1)
    decider.saved()
    decider.decide(2)
    decider.decide(3)
    assert seen[0] > 0 and seen[2] > seen[1] > 0


def test_the_manager_saves_by_them(opened: Opened, training: Training) -> None:
    manager = opened(save_when=[EverySteps(4), lambda moment: moment.step == 6])
    for step in range(1, 10):
        assert manager.should_save(step) == manager.should_save(step)  # asked twice, it says the same
        if manager.should_save(step):
            manager.save(step, training.at(step)).result()
    assert manager.steps().result() == [4, 6, 8]


# ── preemption ──


def test_a_signal_makes_the_next_step_the_last(opened: Opened, training: Training) -> None:
    before: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, _: before.append(number))
    try:
        with opened(save_when=[EverySteps(100), OnPreemption()]) as manager:
            assert not manager.should_save(1)
            signal.raise_signal(signal.SIGUSR1)
            told = [manager.preempted, manager.should_save(2), manager.preempted]
            assert told == [False, True, True]  # it is told at a step
            manager.save(2, training.at(2))
            assert not manager.should_save(3)
        assert before == [signal.SIGUSR1]
        signal.raise_signal(signal.SIGUSR1)
        assert before == [signal.SIGUSR1] * 2
        assert opened().steps().result() == [2]
    finally:
        signal.signal(signal.SIGUSR1, previous)


async def test_signals_are_given_back_by_an_async_context(run: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    async with CheckpointManager(run, process=False, save_when=OnPreemption((signal.SIGTERM,))) as manager:
        assert signal.getsignal(signal.SIGTERM) is not before
        signal.raise_signal(signal.SIGTERM)  # the default handler, which would end the process, is not called
        assert manager.should_save(1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_who_takes_a_signal_over_after_us_keeps_it() -> None:
    preemption = Preemption((signal.SIGUSR2,))
    before = signal.getsignal(signal.SIGUSR2)
    preemption.install()
    try:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        preemption.remove()
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_only_the_main_thread_hears_signals(run: Any) -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(InvalidOption, match="main thread"):
        pool.submit(Preemption((signal.SIGUSR2,)).install).result()


def ended_by(program: Callable[[], object]) -> int:
    """The signal that ends a fork of this process in ``program``; 0 if it comes to its end."""
    pid = os.fork()
    if pid == 0:
        try:
            program()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code <= 0, "the fork failed"
    return -code


def as_at_start() -> None:
    """What pytest and its plugins do with signals is undone."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def heard(patience: float) -> Preemption:
    """What has heard a SIGTERM."""
    preemption = Preemption((signal.SIGTERM, signal.SIGUSR1), patience)
    preemption.install()
    signal.raise_signal(signal.SIGTERM)
    return preemption


def test_a_program_that_does_not_look_is_ended_all_the_same(run: Path) -> None:
    def train() -> None:
        as_at_start()
        with CheckpointManager(run, process=False, save_when=OnPreemption(deadline=0.1)) as manager:
            assert manager.should_save(1) is False  # it has looked before, and never again
            os.kill(os.getpid(), signal.SIGUSR1)
            threading.Event().wait(30)

    assert ended_by(train) == signal.SIGUSR1


def test_one_that_has_looked_ends_by_itself() -> None:
    def looks() -> None:
        as_at_start()
        preemption = heard(0.05)
        preemption.answer()
        asyncio.run(preemption.watch())

    def is_asked_again_much_later() -> None:
        looks()
        signal.raise_signal(signal.SIGUSR1)

    assert ended_by(looks) == 0
    assert ended_by(is_asked_again_much_later) == signal.SIGUSR1


def test_a_second_signal_soon_after_changes_nothing() -> None:
    """As a launcher passes on what its children have got from the scheduler already."""

    def train() -> None:
        as_at_start()
        heard(60)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)

    assert ended_by(train) == 0


def test_forked_children_are_ended_at_once() -> None:
    def train() -> None:
        as_at_start()
        heard(60)
        assert ended_by(lambda: signal.raise_signal(signal.SIGTERM)) == signal.SIGTERM

    assert ended_by(train) == 0


def test_a_signal_that_nobody_has_answered_ends_the_program_in_the_end() -> None:
    def train(*, looks: bool = False, knows: bool = False, other: signal.Signals | None = None) -> None:
        as_at_start()
        if other is not None:
            signal.signal(other, lambda number, _: None)
        preemption = Preemption((signal.SIGTERM, signal.SIGUSR1), 60)
        preemption.install()
        if knows:
            preemption.know()
        signal.raise_signal(signal.SIGUSR1)
        if looks:
            assert preemption.answer()
        signal.raise_signal(signal.SIGTERM)
        preemption.remove()

    assert ended_by(train) == signal.SIGUSR1  # the first
    assert ended_by(partial(train, other=signal.SIGUSR1)) == signal.SIGTERM
    assert ended_by(partial(train, other=signal.SIGTERM)) == signal.SIGUSR1
    assert ended_by(partial(train, looks=True)) == 0
    assert ended_by(partial(train, knows=True)) == 0


@pytest.mark.parametrize("way", ["with", "async with", "close on a thread"])
def test_a_signal_in_the_middle_of_closing_waits_for_its_end(run: Path, training: Training, way: str) -> None:
    def close(manager: CheckpointManager) -> None:
        finish = manager._checkpointer.close

        def interrupted() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            finish()

        manager._checkpointer.close = interrupted  # type: ignore[method-assign]  # a fault, for this test
        manager.save(1, training.at(1))
        if way == "close on a thread":
            with ThreadPoolExecutor(1) as pool:
                pool.submit(manager.close).result()

    def train() -> None:
        as_at_start()
        options: Any = {"process": False, "save_when": OnPreemption(deadline=60)}

        async def trains() -> None:
            async with CheckpointManager(run, **options) as manager:
                close(manager)

        if way == "async with":
            asyncio.run(trains())
        else:
            with CheckpointManager(run, **options) as manager:
                close(manager)
        threading.Event().wait(30)

    assert ended_by(train) == signal.SIGTERM
    assert len((run / "history.jsonl").read_bytes().splitlines()) == 1  # which is the last that closing waits for


def test_who_closes_again_on_the_main_thread_gets_the_signals_back(run: Path) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with CheckpointManager(run, process=False, save_when=OnPreemption((signal.SIGUSR2,))) as manager:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(manager.close).result()
        assert signal.getsignal(signal.SIGUSR2) is not before
    assert signal.getsignal(signal.SIGUSR2) is before


@pytest.mark.parametrize("way", ["close", "aclose"])
def test_who_closes_meanwhile_waits_for_the_end_of_the_first(
    run: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    manager = CheckpointManager(run, process=False, save_when=OnPreemption((signal.SIGUSR2,)))
    manager.open().result()
    order: list[str] = []
    closing, waited_for = threading.Event(), threading.Event()
    finish, remove, wait = manager._close, Preemption.remove, manager._ended.wait

    def held() -> None:
        closing.set()
        assert waited_for.wait(30)
        finish()
        order.append("closed")

    def removed(self: Preemption) -> None:
        order.append("removed")
        remove(self)

    def waits(timeout: float | None = None) -> bool:
        waited_for.set()
        return wait(timeout)

    monkeypatch.setattr(manager, "_close", held)
    monkeypatch.setattr(manager._ended, "wait", waits)
    monkeypatch.setattr(Preemption, "remove", removed)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(manager.close)
        assert closing.wait(30)
        asyncio.run(manager.aclose()) if way == "aclose" else manager.close()
        first.result()
    assert order[0] == "closed" and set(order[1:]) == {"removed"}
    assert signal.getsignal(signal.SIGUSR2) is before


def test_closing_in_the_middle_of_closing_returns_at_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal's handler may, or a done callback."""
    ended: list[bool] = []

    def close_again(*_: object) -> None:
        manager.close()
        ended.append(manager._ended.is_set())

    manager = CheckpointManager(run, process=False)
    looked, finish = manager.steps(), manager._close

    def interrupted() -> None:
        close_again()
        looked.add_done_callback(close_again)
        finish()

    monkeypatch.setattr(manager, "_close", interrupted)
    manager.close()
    assert ended == [False, False]


def test_a_program_that_has_heard_of_its_end_from_another_rank_ends_by_itself(engine: Engine) -> None:
    def train() -> None:
        as_at_start()
        preemption = Preemption((signal.SIGTERM,), 60)
        preemption.install()
        decider = Decider([OnPreemption()], preemption, SoleRank(), engine, lambda: None)
        decider._heard_preempted = True
        assert decider.decide(1).save
        signal.raise_signal(signal.SIGTERM)
        preemption.remove()

    assert ended_by(train) == 0


def test_handlers_that_were_there_decide_for_themselves() -> None:
    def train() -> None:
        before: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: before.append(number))
        asyncio.run(heard(0.01).watch())
        signal.raise_signal(signal.SIGTERM)
        assert before == [signal.SIGTERM] * 2

    assert ended_by(train) == 0


class StuckHandle:
    """A save that is never durable."""

    path = "run/step_1"

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> bool:
        self.cancelled.set()
        return True

    def add_done_callback(self, fn: Any) -> None:
        """It is never done."""


def test_the_last_save_is_cut_off_at_its_deadline(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    handle: Any = StuckHandle()
    with opened() as manager:
        manager._saves.limit(handle, time.monotonic() + 0.02)
    assert handle.cancelled.is_set()
    assert "run/step_1, was not durable in time before the process ends" in caplog.text


# ── several ranks ──


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


def test_preemption_of_one_rank_is_that_of_all(job: Any) -> None:
    made = job(2, [OnPreemption((signal.SIGUSR1,))])

    def pause(rank: int, step: int) -> None:
        if rank == 1 and step == 20:
            made.preemptions[1].heard = time.monotonic()
        time.sleep(0.001)

    found = made.run(range(1, 101), pause)
    assert found[0] == found[1] and len(found[0]) == 1
    step, what = found[0][0]
    assert 20 < step <= 20 + 5 * WINDOW and what == "save preempted"
    assert all(decider.preempted for decider in made.deciders)


def test_a_failure_of_one_rank_surfaces_on_all_at_one_step(job: Any) -> None:
    made = job(2, [EverySteps(1000)])

    def pause(rank: int, step: int) -> None:
        if rank == 1 and step == 20:
            made.failures[1] = "StorageFull: no space"
        time.sleep(0.001)

    found = made.run(range(1, 101), pause)
    assert found[0] == found[1] and [what for _, what in found[0]] == ["failure"]


def test_a_rank_0_that_is_silent_is_named(job: Any) -> None:
    made = job(2, [EverySeconds(100)], deadline=0.1)
    assert not made.deciders[1].decide(1).save
    with pytest.raises(PeerFailed, match=r"rank 0 did not say within 0\.1 s"):
        made.deciders[1].decide(1 + WINDOW)
