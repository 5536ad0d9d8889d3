"""Ranks agree, and nothing is lost, whatever happens to them and in whatever order."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import pytest

from asyncdcp.pipeline import commit
from asyncdcp.pipeline.commit import TRANSITIONS, Action, Event, State
from asyncdcp.storage import LocalStorage
from tests.reliability.ranks import simulate
from tests.reliability.worlds import Lost


@pytest.mark.parametrize("block", range(4))
def test_seeds(block: int) -> None:
    ended = Counter(simulate(seed) for seed in range(block * 25, block * 25 + 25))
    assert ended["commit"] > 3 and ended["two"] > 0


def test_a_seed_replays() -> None:
    assert [simulate(seed) for seed in range(8)] == [simulate(seed) for seed in range(8)]


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
