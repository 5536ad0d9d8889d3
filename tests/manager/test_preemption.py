"""Preemption: signals that ask the job to end, who hears of them, and when they end the process after all."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncdcp import CheckpointManager, EverySteps, OnPreemption
from asyncdcp.engine import Engine
from asyncdcp.errors import InvalidOption
from asyncdcp.manager.deciding import Decider
from asyncdcp.manager.preemption import Preemption
from asyncdcp.ranks import SoleRank
from tests.manager.conftest import Opened, Training


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


def test_one_that_only_reads_leaves_the_signals_alone(opened: Opened) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with opened(read_only=True, save_when=OnPreemption()):
        assert signal.getsignal(signal.SIGTERM) is before


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
        preemption = heard(60)
        preemption.answer()
        preemption.patience = 0.05
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
        self.committed = self

    def cancel(self) -> bool:
        self.cancelled.set()
        return True

    async def settled(self) -> None:
        """It never is."""
        await anyio.sleep_forever()


def test_the_last_save_is_cut_off_at_its_deadline(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    handle: Any = StuckHandle()
    with opened() as manager:
        manager._saves.limit(handle, time.monotonic() + 0.02)
    assert handle.cancelled.is_set()
    assert "run/step_1, was not durable in time before the process ends" in caplog.text
