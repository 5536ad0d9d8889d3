"""Readers of a run that goes on."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path

import pytest

import asyncdcp
from asyncdcp import KeepLast
from asyncdcp.errors import CheckpointGone, Closed, InvalidOption
from tests.manager.conftest import Opened, Training, save_all

QUICK = 0.01


async def test_it_comes_upon_each_checkpoint_as_it_is_committed(opened: Opened, training: Training, run: Path) -> None:
    found = []
    async with aclosing(asyncdcp.follow(run, poll_seconds=QUICK)) as followed:  # the run is not there yet
        manager = opened()
        save_all(manager, training, 1)
        async for published in followed:
            found.append((published.step, (await published.load())["progress"]["step"]))
            if published.step == 3:
                break
            save_all(manager, training, published.step + 1)
    assert found == [(1, 1), (2, 2), (3, 3)]


async def test_what_is_there_already(opened: Opened, training: Training, run: Path) -> None:
    save_all(opened(), training, 1, 2, 3)
    for options, expected in (({}, [3]), ({"every": "all"}, [1, 2, 3]), ({"every": "all", "after": 1}, [2, 3])):
        found = []
        async with aclosing(asyncdcp.follow(run, poll_seconds=QUICK, **options)) as followed:
            async for published in followed:
                found.append(published.step)  # it never ends
                if published.step == 3:
                    renamed = await published.load({"at": {"step": 0}}, keys=["progress.*"], rename={"progress": "at"})
                    assert renamed == {"at": {"step": 3}}
                    break
        assert found == expected


async def test_a_load_after_its_end_says_so(opened: Opened, training: Training, run: Path) -> None:
    save_all(opened(), training, 1)
    async with aclosing(asyncdcp.follow(run, poll_seconds=QUICK)) as followed:
        published = await anext(followed)
    with pytest.raises(Closed, match=r"step 1 .* follow\(\) yielded, .* closed; load it before"):
        published.load()


async def test_what_retention_took_is_gone_and_it_moves_on(opened: Opened, training: Training, run: Path) -> None:
    manager = opened(keep=KeepLast(1))
    save_all(manager, training, 1)
    gone = 0
    async with aclosing(asyncdcp.follow(run, poll_seconds=QUICK)) as followed:
        async for published in followed:
            if published.step == 1:
                save_all(manager, training, 2)  # which deletes what is about to be read
            try:
                target = Training()
                await published.load(target.state)
            except CheckpointGone:
                gone += 1
                continue
            assert target.step == published.step == 2
            break
    assert gone == 1


async def test_after_a_rollback_steps_come_anew(opened: Opened, training: Training, run: Path) -> None:
    manager = opened()
    save_all(manager, training, 1, 2)
    steps = []
    async with aclosing(asyncdcp.follow(run, poll_seconds=QUICK)) as followed:
        async for published in followed:
            steps.append(published.step)
            if len(steps) == 1:
                manager.restore(1, training.state).result()
                save_all(manager, training, 2)
            else:
                break
    assert steps == [2, 2]


async def test_wrong_options_are_refused(run: Path) -> None:
    """By the call, not by the first look."""
    for wrong in ({"every": "some"}, {"poll_seconds": 0}, {"poll_seconds": "1"}, {"after": -1}):
        with pytest.raises(InvalidOption):
            asyncdcp.follow(run, **wrong)


async def test_a_checkpoint_is_no_run_to_wait_for(opened: Opened, training: Training, run: Path) -> None:
    save_all(opened(), training, 1)
    async with aclosing(asyncdcp.follow(run / "step_1", poll_seconds=QUICK)) as followed:
        with pytest.raises(InvalidOption, match="step_1 is a checkpoint, and no run"):
            await anext(followed)
