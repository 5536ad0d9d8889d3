"""Ranks agree, and nothing is lost, whatever happens to them and in whatever order."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress

import pytest

from asyncdcp.errors import AsyncDCPError
from asyncdcp.pipeline import commit
from asyncdcp.pipeline.commit import TRANSITIONS, Action, Event, State
from asyncdcp.storage import LocalStorage
from tests.reliability.ranks import simulate
from tests.reliability.simulation import simulated
from tests.reliability.worlds import ENDLESS, Lost, World, version_at
from tests.virtual import run


@pytest.mark.parametrize("block", range(4))
def test_seeds(block: int) -> None:
    ended = Counter(simulate(seed) for seed in range(block * 25, block * 25 + 25))
    assert ended["commit"] > 3 and ended["two"] > 0


def test_a_seed_replays() -> None:
    assert [simulate(seed) for seed in range(8)] == [simulate(seed) for seed in range(8)]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_dies_at_any_call_is_named_and_costs_nothing(rank: int) -> None:
    """Killed after its n-th call that changes the disk, for every n."""
    ended = Counter[str]()
    for calls in range(1, 200):
        with simulated():
            outcome = run(_dies(rank, calls))
        ended[outcome] += 1
        if outcome == "lived":
            break
    assert ended["lived"] == 1 and ended["given up"] > 8
    assert ended["committed"] > 0  # it is killed when all is durable, but for its own last steps


async def _dies(rank: int, calls: int) -> str:
    world = World(ranks=3)
    await world.save()
    budgets = [ENDLESS] * 3
    budgets[rank] = calls
    begun = asyncio.get_running_loop().time()
    errors = await world.try_to_save(budgets)
    assert asyncio.get_running_loop().time() - begun < 1800 + 60  # the deadline, and what naming the late takes
    others = [error for n, error in enumerate(errors) if n != rank]
    if None in others:
        assert others == [None, None]
    for error in others:
        assert error is None or (isinstance(error, AsyncDCPError) and error.rank == rank), (calls, error)
    assert await version_at(world.storage()) == (1 if others[0] else 2)
    await world.save()
    assert await version_at(world.storage()) == 3
    return "given up" if others[0] else "committed" if errors[rank] else "lived"


def test_a_claim_that_is_not_exclusive_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the check of ``link`` taken out, a second claim takes the name from the first."""

    def publish(self: LocalStorage, path: str, data: bytes) -> bool:
        with suppress(OSError):
            self._posix.unlink(path)
        return whole(self, path, data)

    whole = LocalStorage._publish
    monkeypatch.setattr(LocalStorage, "_publish", publish)
    with pytest.raises(Lost):
        for seed in range(300):
            simulate(seed)


def test_giving_up_without_an_abort_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that just says that it gives up, without winning the Record."""
    peer = dict(TRANSITIONS["peer"])
    peer[State.WAITING, Event.GIVE_UP] = (State.ABORTED, Action.FINISH)
    monkeypatch.setattr(commit, "TRANSITIONS", {**TRANSITIONS, "peer": peer})
    with pytest.raises(Lost):
        for seed in (*range(200, 210), *range(600)):  # the first ones that are found at the time of writing
            simulate(seed)
