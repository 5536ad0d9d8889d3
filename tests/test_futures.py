"""CheckpointFuture blocked on, cancelled and with callbacks, and whether an error of it was seen."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import os
import threading
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import pytest

from asyncdcp.engine import Engine
from asyncdcp.errors import Cancelled, DeadlineExceeded, WouldDeadlock
from asyncdcp.futures import CheckpointFuture
from tests.work import LONG, add, fail, forever

# ── blocking ──


def test_result_and_exception(engine: Engine) -> None:
    assert engine.submit(add, 1, 2).result() == 3
    assert engine.submit(add, 1, 2).exception(LONG) is None
    failed = engine.submit(fail, "oh")
    assert isinstance(failed.exception(), ValueError)
    with pytest.raises(ValueError, match="oh"):
        failed.result()


def test_timeout_names_the_work(engine: Engine) -> None:
    future = engine.future("save of step 3")
    with pytest.raises(DeadlineExceeded, match=r"save of step 3.*timeout=0") as info:
        future.result(0)
    assert isinstance(info.value, TimeoutError)
    with pytest.raises(DeadlineExceeded):
        future.exception(0)


def test_an_error_raised_often_keeps_the_traceback_of_the_work(engine: Engine) -> None:
    failed = engine.submit(fail, "oh")
    lengths = set()
    for _ in range(3):
        with pytest.raises(ValueError, match="oh") as info:
            failed.result()
        frames = traceback.extract_tb(info.value.__traceback__)
        assert frames[-1].name == "fail"
        lengths.add(len(frames))
    assert len(lengths) == 1


def test_blocking_on_the_engines_loop_is_refused(engine: Engine) -> None:
    other = engine.future("other")

    async def block() -> None:
        other.result()

    with pytest.raises(WouldDeadlock, match="other"):
        engine.submit(block).result(LONG)

    async def block_on_done() -> Any:
        return other.result()

    other.resolve(1)
    assert engine.submit(block_on_done).result(LONG) == 1


def test_blocking_in_a_done_callback_is_refused(engine: Engine) -> None:
    other, seen = engine.future("other"), engine.future("seen")

    def callback(_: object) -> None:
        try:
            other.exception()
        except WouldDeadlock as error:
            seen.resolve(error)

    engine.submit(add, 1, 2).add_done_callback(callback)
    assert isinstance(seen.result(LONG), WouldDeadlock)


def test_resolved_exactly_once(engine: Engine) -> None:
    future = engine.future("it")
    assert future.resolve(1)
    assert not future.resolve(2) and not future.fail(ValueError())
    assert future.result() == 1


def test_report_is_the_owners(engine: Engine) -> None:
    future = engine.future("it")
    assert future.report is None
    future.report = {"bytes": 1}
    assert future.report == {"bytes": 1}


# ── retrieved ──


def test_an_error_counts_as_seen_once_someone_got_it(engine: Engine) -> None:
    def failed() -> CheckpointFuture[None]:
        work = engine.submit(fail, "oh")
        assert work._resolved.wait(LONG)
        assert isinstance(work.unseen_failure, ValueError)
        return work

    by_exception = failed()
    by_exception.exception()
    assert by_exception.unseen_failure is None
    by_result = failed()
    with pytest.raises(ValueError, match="oh"):
        by_result.result()
    assert by_result.unseen_failure is None
    by_await = failed()
    with pytest.raises(ValueError, match="oh"):
        asyncio.run(by_await._wait())
    assert by_await.unseen_failure is None
    by_owner = failed()
    by_owner.mark_seen()
    assert by_owner.unseen_failure is None


@pytest.mark.parametrize("wait", [CheckpointFuture.result, lambda future: asyncio.run(future._wait())])
def test_an_error_that_is_awaited_is_at_no_moment_nobodys(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, wait: Callable[[Any], Any]
) -> None:
    """Who was woken by it has not raised it yet when its engine's owner looks."""
    future, outcome = engine.future("it"), CheckpointFuture._outcome
    nobodys: list[bool] = []

    def look_first(failed: CheckpointFuture[Any]) -> Any:
        nobodys.append(not failed.awaited and failed.unseen_failure is not None)
        return outcome(failed)

    def fail_when_awaited() -> None:
        while not future.awaited:
            os.sched_yield()
        future.fail(ValueError("oh"))

    monkeypatch.setattr(CheckpointFuture, "_outcome", look_first)
    failing = threading.Thread(target=fail_when_awaited)
    failing.start()
    with pytest.raises(ValueError, match="oh"):
        wait(future)
    failing.join()
    assert nobodys == [False]


def test_a_callback_alone_does_not_count_as_seeing(engine: Engine) -> None:
    called = threading.Event()
    work = engine.submit(fail, "oh")
    work.add_done_callback(lambda _: called.set())
    assert called.wait(LONG)
    assert work.unseen_failure is not None


def test_an_error_nobody_sees_makes_no_noise_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine("engine")
    work = engine.submit(fail, "oh")
    work._resolved.wait(LONG)
    engine.close(LONG)
    del work, engine
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gc.collect()
    assert not caught
    assert not caplog.records


# ── cancel ──


def test_cancel_ends_the_work(engine: Engine) -> None:
    started = threading.Event()

    async def work() -> None:
        started.set()
        await forever()

    future = engine.submit(work, name="save")
    assert started.wait(LONG)
    assert future.cancel()
    assert future.cancel() in (True, False)  # asked again while it ends, or done meanwhile
    with pytest.raises(Cancelled, match="save"):
        future.result(LONG)
    assert future.cancelled()
    assert not future.cancel()


def test_cancel_before_the_work_began(engine: Engine) -> None:
    held, going = threading.Event(), threading.Event()

    def hold() -> None:
        going.set()
        held.wait()

    engine.call(hold)
    assert going.wait(LONG)
    future = engine.submit(forever)
    assert future.cancel()
    held.set()
    assert isinstance(future.exception(LONG), Cancelled)


def test_cancelled_work_waits_for_its_thread_and_the_outcome_decides(engine: Engine) -> None:
    started, go = threading.Event(), threading.Event()

    def write() -> int:
        started.set()
        go.wait()
        return 1

    future = engine.submit(anyio.to_thread.run_sync, write)
    assert started.wait(LONG)
    assert future.cancel()
    engine.submit(asyncio.sleep, 0).result(LONG)  # by then the cancellation was delivered
    assert not future.done()
    assert future.cancel()
    go.set()
    error = future.exception(LONG)
    assert error is None or future.cancelled()


def test_the_owner_is_asked_once_on_the_loop(engine: Engine) -> None:
    asked: list[bool] = []
    future = engine.future("it", cancel=lambda: asked.append(engine.owns_current_thread()))
    assert future.cancel()
    assert future.cancel()
    engine.submit(add, 1, 2).result(LONG)
    assert asked == [True]
    assert not future.done()
    future.resolve(1)
    assert not future.cancel()
    assert not future.cancelled()


def test_what_cannot_be_given_up_says_so(engine: Engine) -> None:
    assert not engine.future("it").cancel()


# ── callbacks ──

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="none")


def test_callbacks_in_order_in_their_context_off_the_loop(engine: Engine) -> None:
    future, end = engine.future("it"), threading.Event()
    seen: list[tuple[int, str, bool]] = []

    def callback(n: int) -> Callable[[object], None]:
        return lambda _: seen.append((n, VARIABLE.get(), engine._on_loop()))

    def add_in_context(n: int) -> None:
        VARIABLE.set(f"at {n}")
        future.add_done_callback(callback(n))

    for n in range(3):
        contextvars.copy_context().run(add_in_context, n)
    engine.call(future.resolve, 1)
    future.result(LONG)
    future.add_done_callback(callback(3))
    future.add_done_callback(lambda _: end.set())
    assert end.wait(LONG)
    assert seen == [(0, "at 0", False), (1, "at 1", False), (2, "at 2", False), (3, "none", False)]


@pytest.mark.parametrize("error", [ValueError("oh"), SystemExit(1)])
def test_a_failing_callback_is_logged_and_the_next_one_runs(
    engine: Engine, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def callback(_: object) -> None:
        raise error

    future, end = engine.future("it"), threading.Event()
    future.add_done_callback(callback)
    future.add_done_callback(lambda _: end.set())
    future.resolve(1)
    assert end.wait(LONG)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_a_callback_added_after_the_engine_closed_still_runs() -> None:
    engine, end = Engine("engine"), threading.Event()
    work = engine.submit(add, 1, 2)
    engine.close(LONG)
    work.add_done_callback(lambda _: end.set())
    assert end.wait(LONG)


def test_close_waits_for_callbacks() -> None:
    engine, seen = Engine("engine"), []
    work = engine.submit(add, 1, 2)
    for n in range(100):
        work.add_done_callback(partial(lambda n, _: seen.append(n), n))
    engine.close(LONG)
    assert seen == list(range(100))
