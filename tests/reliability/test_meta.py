"""The suite can fail: with any one sync, link or check taken out, what it looks at shows the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import AsyncMock, patch

import pytest

from asyncdcp.names import record_save_id
from asyncdcp.pipeline.commit import Event
from asyncdcp.pipeline.settle import Settlement
from tests.reliability.power import explore
from tests.reliability.worlds import PLACE, Call, Lost, Seen


class Roles:
    """What each sync of a run is for: of which file, or of which directory before or after the Record has its name.

    The ``number``-th sync of role ``without`` is not made, none of them with 0.
    """

    def __init__(self, without: str = "", number: int = 0) -> None:
        self.seen: list[str] = []
        self._without = without
        self._number = number
        self._claimed = False

    def __call__(self, call: Call) -> Any:
        if call.operation == "link":
            self._claimed = record_save_id(call.path.rpartition("/")[2]) is not None
        if call.operation != "fsync":
            return call()
        role = self._role(call.path)
        self.seen.append(role)
        if role == self._without and self._number in (0, self.seen.count(role)):
            return None
        return call()

    def _role(self, path: str) -> str:
        if path.endswith(".safetensors"):
            return "data"
        if ".index.json" in path:
            return "index"
        if ".json" in path:
            self._claimed = False
            return "record"
        if path == PLACE:
            return "directory, after the claim" if self._claimed else "directory, before the claim"
        return f"ancestor {path}"


NEEDED = [
    ("data", ("save",)),
    ("data", ("save", "save")),
    ("index", ("save",)),
    ("index", ("save", "save")),
    ("record", ("save",)),
    ("record", ("save", "save")),
    # What is not there yet cannot be lost: this one protects the checkpoint that is saved over.
    ("directory, before the claim", ("save", "save")),
    ("directory, after the claim", ("save",)),
    ("directory, after the claim", ("save", "save")),
    *((f"ancestor {path}", ("save",)) for path in ("/runs/gpt", "/runs", "/")),
    *((f"ancestor {path}", ("killed after 5", "save")) for path in ("/runs/gpt", "/runs", "/")),
]


@pytest.mark.parametrize(("role", "steps"), NEEDED, ids=str)
def test_without_one_sync_something_is_lost(role: str, steps: Sequence[str]) -> None:
    explore(steps, limit=100)
    with pytest.raises(Lost):
        explore(steps, limit=100, intercept=Roles(role))


def test_every_sync_of_a_save_is_needed() -> None:
    """Each by itself, in its turn; but for the first of a directory in which nothing is to be lost yet."""
    roles = Roles()
    explore(("save", "save"), limit=1, intercept=roles)
    assert set(roles.seen) == {role for role, _ in NEEDED}
    for number, role in enumerate(roles.seen):
        nth = roles.seen[: number + 1].count(role)
        second = number >= len(roles.seen) // 2
        if role.startswith("ancestor") == second or (role == "directory, before the claim" and not second):
            continue
        with pytest.raises(Lost):
            explore(("save", "save"), limit=100, intercept=Roles(role, nth))


# ── two ranks ──


def look_where_one_is_killed(rank: int, lag: float = 0.0) -> None:
    """Two ranks save over a checkpoint, the second ``lag`` seconds late; one is killed after each of its calls."""
    seen = Seen()
    for calls in range(5, 34):
        budgets = ["never", "never"]
        budgets[rank] = str(calls)
        explore(("save", f"killed after {','.join(budgets)}"), ranks=2, limit=10, seen=seen, lag=lag)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("lag", [0.0, 9.0])
def test_whichever_rank_is_killed_nothing_is_lost(rank: int, lag: float) -> None:
    look_where_one_is_killed(rank, lag)


def test_without_the_committers_barrier_something_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's Index can be seen before its name is durable; a Record that lists it must not be."""
    whole = Settlement._check_indexes

    async def without(self: Settlement) -> None:
        with patch.object(self._storage, "barrier", AsyncMock()):
            await whole(self)

    monkeypatch.setattr(Settlement, "_check_indexes", without)
    with pytest.raises(Lost):
        look_where_one_is_killed(1, lag=9.0)


def test_without_a_peers_barrier_something_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer may see the Record of a committer that dies before it has made it durable."""

    async def without(self: Settlement) -> Event:
        return Event.PUBLISHED

    monkeypatch.setattr(Settlement, "_publish", without)
    with pytest.raises(Lost):
        look_where_one_is_killed(0)
