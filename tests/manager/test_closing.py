"""The end of a manager: reached once, whoever asks for it, wherever and however often; and nothing is lost by it."""

from __future__ import annotations

import asyncio
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncdcp import CheckpointManager, MemoryStorage, OnPreemption, Options, Telemetry
from asyncdcp.errors import DeadlineExceeded, WouldDeadlock
from asyncdcp.manager.preemption import Preemption
from asyncdcp.storage import MemoryPlace
from tests.manager.conftest import Opened, Training


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
    finish, remove, wait = manager._close, Preemption.remove, manager._ending.over.wait

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
    monkeypatch.setattr(manager._ending.over, "wait", waits)
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
        ended.append(manager._ending.over.is_set())

    manager = CheckpointManager(run, process=False)
    looked, finish = manager.steps(), manager._close

    def interrupted() -> None:
        close_again()
        looked.add_done_callback(close_again)
        finish()

    monkeypatch.setattr(manager, "_close", interrupted)
    manager.close()
    assert ended == [False, False]


@pytest.mark.parametrize("where", ["done callback", "on_event"])
def test_a_first_close_in_a_callback_is_refused_and_nothing_is_closed(
    opened: Opened, training: Training, where: str
) -> None:
    caught, done = list[BaseException](), threading.Event()

    def close(_: object) -> None:
        if not done.is_set():
            with pytest.raises(WouldDeadlock) as raised:
                manager.close()
            caught.append(raised.value)
            done.set()

    manager = opened(telemetry=Telemetry(on_event=close) if where == "on_event" else None)
    handle = manager.save(1, training.at(1))
    if where == "done callback":
        handle.add_done_callback(close)
    assert done.wait(30) and caught
    handle.result()
    manager.save(2, training.at(2))
    manager.wait().result()
    assert manager.steps().result() == [1, 2]


release = threading.Event()


class Stuck(MemoryStorage):
    async def barrier(self) -> None:
        await asyncio.to_thread(release.wait, 30)


class Run(MemoryPlace):
    """Its second step does not become durable before ``release``."""

    def child(self, name: str) -> MemoryStorage:
        return Stuck(name) if name == "step_2" else super().child(name)


def test_a_signal_that_cuts_a_close_short_is_not_held_up_by_what_follows_from_a_save(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    release.clear()
    manager = CheckpointManager(Run("run"), process=False, takeover_seconds=0.0)
    handle = manager.save(2, training.at(2))
    close = manager._checkpointer.close

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(manager._checkpointer, "close", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            manager.close()
        assert not handle.done(), "it was not waited for"
    finally:
        release.set()
        close()


class Lost(MemoryPlace):
    """What is asked of it, once it is ``lost``, never comes."""

    lost = False

    async def survey(self, selects: Any, limit: int) -> Any:
        if self.lost:
            await anyio.sleep_forever()
        return await super().survey(selects, limit)


@pytest.mark.parametrize(("lost", "cut"), [("run", "what follows from step 1"), ("far", "the copying to the mirror")])
def test_what_follows_from_a_save_and_is_cut_off_by_closing_is_told(training: Training, lost: str, cut: str) -> None:
    places = {"run": Lost("run"), "far": Lost("far")}
    options = Options(close_deadline=0.05)
    manager = CheckpointManager(
        places["run"], process=False, options=options, mirror=places["far"], takeover_seconds=0.0
    )
    manager.restore_latest(training.state).result()
    places[lost].lost = True
    manager.save(1, training.at(1)).result()
    if lost == "far":
        manager._saves._saves[0].over.result(30)
    with pytest.raises(DeadlineExceeded, match=rf"within 0.05 s \(option close_deadline\): {cut}"):
        manager.close()


def test_what_failed_unseen_is_noted_where_closing_is_late(training: Training) -> None:
    release.clear()
    options = Options(close_deadline=0.05, settle_seconds=0.05)
    manager = CheckpointManager(Run("run"), process=False, options=options, takeover_seconds=0.0)
    try:
        manager.save(1, training.at(1)).result()
        manager._saves.collect(OSError("the mirror is gone"))  # as the mirror's copying does
        manager._checkpointer.save(Run("run").child("step_2"), training.at(2))
        with pytest.raises(DeadlineExceeded) as caught:
            manager.close()
    finally:
        release.set()
    assert any("the mirror is gone" in note for note in caught.value.__notes__)
