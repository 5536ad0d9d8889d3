"""Cancelled at every point: the futures say so or commit, the queue goes on, no slot and no file is left."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from asyncdcp import MemoryStorage
from asyncdcp.errors import Cancelled
from asyncdcp.names import record_save_id
from asyncdcp.pipeline.records import read_records
from asyncdcp.staging.copier import SlabCopier
from tests.checkpointer.conftest import STATE, Opened, works

MIB = 1 << 20


def only_aborts(storage: Any) -> bool:
    """Whether nothing but aborts is left, and nothing is open."""
    names = asyncio.run(storage.list())
    records = asyncio.run(read_records(storage, names))
    return (
        all(record_save_id(name) for name in names)
        and all(record.outcome == "abort" for record in records)
        and not getattr(storage, "unfinished", None)
    )


@pytest.mark.parametrize("staging_bytes", [None, 8 * MIB])
@pytest.mark.parametrize(
    "point",
    [("list", 1), ("create", 1), ("write", 1), ("write", 3), ("finish", 1), ("put", 1), ("barrier", 1)],
    ids=lambda point: "-".join(map(str, point)),
)
@pytest.mark.parametrize("by", ["handle", "staged"])
def test_at_each_step_of_writing(
    opened: Opened, faulty: Any, staging_bytes: int | None, point: tuple[str, int], by: str
) -> None:
    checkpointer, storage, behind = opened(staging_bytes=staging_bytes), faulty(), MemoryStorage("behind")
    gate = storage.gate(*point)
    handle = checkpointer.save(storage, STATE)
    following = checkpointer.save(behind, STATE)
    gate.wait_begun()
    if by == "staged" and not handle.staged.done() and point[0] in ("list", "create"):
        handle.staged.wait(0.05)  # staging goes on beside; either it is done by then, or it is cancelled
    asked = (handle if by == "handle" else handle.staged).cancel()
    if not asked:
        handle.cancel()  # it was staged already, so there was nothing to cancel in that
    gate.release.set()
    with pytest.raises(Cancelled, match="faulty was cancelled"):
        handle.result()
    assert handle.committed.cancelled()
    assert handle.staged.done()
    assert only_aborts(storage)
    assert following.result().tensors == 1
    assert torch.equal(checkpointer.load(behind).result()["w"], STATE["w"])
    assert works(checkpointer)


def test_while_the_commit_is_claimed_it_commits(opened: Opened, faulty: Any) -> None:
    checkpointer, storage = opened(), faulty()
    gate = storage.gate("claim", 1)
    handle = checkpointer.save(storage, STATE)
    gate.wait_begun()
    assert handle.cancel()
    gate.release.set()
    assert handle.result().tensors == 1
    assert not handle.cancel()
    assert torch.equal(checkpointer.load(storage).result()["w"], STATE["w"])
    assert works(checkpointer)


def test_before_its_turn_it_ends_at_once_without_a_trace(opened: Opened, faulty: Any) -> None:
    checkpointer, first, waiting, last = opened(), faulty("first"), faulty("waiting"), MemoryStorage("last")
    gate = first.gate("write")
    handle = checkpointer.save(first, STATE)
    cancelled = [checkpointer.save(waiting, STATE) for _ in range(3)]
    behind = checkpointer.save(last, STATE)
    gate.wait_begun()
    for each in cancelled:
        assert each.cancel()
    for each in cancelled:
        with pytest.raises(Cancelled, match="waiting was cancelled"):
            each.result()
        assert each.staged.done()
    assert not waiting.calls
    assert not behind.done()
    gate.release.set()
    assert handle.result().tensors == 1
    assert behind.result().tensors == 1
    assert works(checkpointer)


def test_at_the_moment_of_the_call(opened: Opened, faulty: Any) -> None:
    """Before the engine has looked at it: the task itself has not begun."""
    checkpointer, storage = opened(), faulty()
    gate = storage.gate("list")  # it does not come to its end before it is cancelled
    for _ in range(20):
        gate.release.clear()
        handle = checkpointer.save(storage, STATE)
        handle.cancel()
        gate.release.set()
        with pytest.raises(Cancelled):
            handle.result()
    assert only_aborts(storage)
    assert works(checkpointer)


def test_while_a_copy_is_under_way_its_slot_waits_for_it(
    opened: Opened, faulty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer, storage = opened(), faulty()
    begun, release, ended = threading.Event(), threading.Event(), threading.Event()
    copy = SlabCopier.copy

    def stuck(self: SlabCopier, *args: Any) -> None:
        begun.set()
        assert release.wait(30)
        copy(self, *args)
        ended.set()

    monkeypatch.setattr(SlabCopier, "copy", stuck)
    handle = checkpointer.save(storage, STATE)
    assert begun.wait(30)
    handle.cancel()
    assert not handle.committed.wait(0.05)
    assert checkpointer._lanes.arenas._current.users == 1  # type: ignore[union-attr]  # there is one
    release.set()
    for future in handle:
        with pytest.raises(Cancelled):
            future.result()
    assert ended.is_set()
    monkeypatch.undo()
    assert only_aborts(storage)
    assert works(checkpointer)


def test_a_settled_save_cannot_be_cancelled(opened: Opened) -> None:
    checkpointer = opened()
    handle = checkpointer.save(MemoryStorage(), STATE)
    handle.result()
    assert not handle.cancel()
    assert not handle.staged.cancel()
    assert handle.result().tensors == 1


def test_a_cancelled_save_is_no_unseen_failure(opened: Opened, faulty: Any) -> None:
    checkpointer, storage = opened(), faulty()
    gate = storage.gate("write")
    checkpointer.save(storage, STATE).cancel()
    gate.release.set()
    assert works(checkpointer)


def test_a_load_can_be_cancelled(opened: Opened, faulty: Any) -> None:
    checkpointer, storage = opened(), faulty()
    checkpointer.save(storage, STATE).result()
    gate = storage.gate("get")
    future = checkpointer.load(storage)
    gate.wait_begun()
    assert future.cancel()
    gate.release.set()
    with pytest.raises(Cancelled):
        future.result()
