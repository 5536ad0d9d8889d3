"""The n-th call fails, n = 1, 2, …, until a save is through: no hang, no leak, no false success; the next one works."""

from __future__ import annotations

import pytest

from asyncdcp.storage.local_directory import LocalDirectory
from tests.reliability.errors import sweep
from tests.reliability.worlds import Lost


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "short", "MemoryError"])  # the others in the long run
def test_one_call_fails(kind: str) -> None:
    assert sweep(kind) > 40


@pytest.mark.parametrize("kind", ["EIO", "short", "MemoryError"])
def test_all_calls_fail_from_one_on(kind: str) -> None:
    sweep(kind, sticky=True, step=7)


@pytest.mark.parametrize("kind", ["EIO", "MemoryError"])
def test_one_call_of_one_of_two_ranks_fails(kind: str) -> None:
    sweep(kind, ranks=2, step=7)


def test_a_failed_sync_that_is_tried_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the check taken out that remembers it, the sweep shows a checkpoint that was acknowledged and is lost."""
    monkeypatch.setattr(LocalDirectory, "check", lambda self: None)
    with pytest.raises(Lost, match=r"call \d+ \(fsync /runs/gpt/step_1\)"):
        sweep("EIO")
