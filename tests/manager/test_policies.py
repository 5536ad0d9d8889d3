"""Policies, and a manager that saves by them."""

from __future__ import annotations

import signal

import pytest

from asyncdcp import EverySeconds, EverySteps, OnPreemption
from asyncdcp.engine import Engine
from asyncdcp.errors import InvalidOption
from asyncdcp.manager.deciding import Decider
from asyncdcp.manager.policies import Moment, When, check_policies
from asyncdcp.ranks import SoleRank
from tests.manager.conftest import Opened, Training


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
        lambda: OnPreemption(signal.SIGTERM),  # type: ignore[arg-type]  # on purpose
        lambda: OnPreemption(["SIGTERM"]),  # type: ignore[arg-type]  # on purpose
        lambda: OnPreemption((signal.SIGTERM, signal.SIGKILL)),
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
