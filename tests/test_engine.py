"""The engine's life: what runs in it, what its end waits for, and what a fork has of it."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import os
import select
import signal
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
from asyncdcp.errors import AsyncDCPError, Cancelled, Closed, DeadlineExceeded, WouldDeadlock
from asyncdcp.futures import CheckpointFuture
from tests.work import LONG, add, forever, open_descriptors

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="none")


def test_work_sees_no_context_of_the_caller(engine: Engine) -> None:
    async def read() -> str:
        return VARIABLE.get()

    VARIABLE.set("caller's")
    assert engine.submit(read).result(LONG) == "none"


def test_calls_and_work_run_in_order(engine: Engine) -> None:
    seen: list[int] = []

    async def work(n: int) -> None:
        seen.append(n)

    for n in range(10):
        last = engine.submit(work, n)
    last.result(LONG)
    assert seen == list(range(10))


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_the_engine_survives_an_exit_in_its_work(engine: Engine, error: type[BaseException]) -> None:
    async def work() -> None:
        raise error

    assert isinstance(engine.submit(work).exception(LONG), error)
    assert engine.submit(add, 1, 2).result(LONG) == 3


def test_an_engine_that_cannot_run_fails_whatever_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    engine = Engine("test")
    made: CheckpointFuture[int] = engine.future("made by itself")
    monkeypatch.setattr(anyio, "CancelScope", full)
    for future in (made, engine.submit(forever)):  # nobody has cancelled either
        with pytest.raises(AsyncDCPError, match=r"Too many open files; raise RLIMIT_NOFILE"):
            future.result(LONG)
    engine.close(LONG)


def test_a_failing_call_is_logged(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    engine.call(lambda: 1 // 0)
    assert engine.submit(add, 1, 2).result(LONG) == 3
    assert "ZeroDivisionError" in caplog.text


def test_close_waits_for_pending_work_and_what_it_starts() -> None:
    engine = Engine("engine")
    started, go = threading.Event(), threading.Event()
    second: list[CheckpointFuture[int]] = []

    async def work() -> int:
        started.set()
        await asyncio.to_thread(go.wait)
        second.append(engine.submit(add, 1, 2))
        return 1

    first = engine.submit(work)
    assert started.wait(LONG)
    closing = threading.Thread(target=engine.close, args=(LONG,))
    closing.start()
    while not engine._closing:
        os.sched_yield()
    with pytest.raises(Closed):
        engine.submit(add, 1, 2)
    go.set()
    closing.join()
    assert first.result() == 1
    assert second[0].result() == 3


def test_a_thread_with_the_number_that_the_engines_had_may_close_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine("engine")
    assert engine.submit(add, 1, 2).result(LONG) == 3
    engine.close(LONG)
    monkeypatch.setattr(engine._thread, "_ident", threading.get_ident())  # it has ended: the system gives it out anew
    assert not engine.owns_current_thread()
    engine.close(LONG)


def test_close_cancels_what_is_left_at_the_deadline() -> None:
    engine = Engine("engine")
    cleaned: list[int] = []

    async def work() -> None:
        try:
            await forever()
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(0)
            cleaned.append(1)

    future, bare = engine.submit(work), engine.future("bare")
    engine.submit(asyncio.sleep, 0).result(LONG)  # by then the work has begun
    engine.close(0)
    assert future.cancelled()
    assert bare.cancelled()
    assert cleaned == [1]
    engine.close(0)
    for call in (lambda: engine.submit(add, 1, 2), lambda: engine.future("x"), lambda: engine.call(print)):
        with pytest.raises(Closed):
            call()


def test_work_that_is_cancelled_before_it_has_begun_begins_and_ends_by_that(engine: Engine) -> None:
    told: list[str] = []

    async def work() -> None:
        try:
            await forever()
        finally:
            told.append("it is given up")

    begins = threading.Event()
    engine.call(begins.wait, LONG)
    future = engine.submit(work)
    assert future.cancel()
    begins.set()
    assert isinstance(future.exception(LONG), Cancelled)
    assert told


def test_close_before_any_work() -> None:
    engine = Engine("engine")
    future = engine.future("it")
    engine.close(0)
    assert future.cancelled()
    with pytest.raises(Closed):
        engine.submit(add, 1, 2)


def test_closing_on_its_own_thread_is_refused(engine: Engine) -> None:
    async def work() -> None:
        engine.close(0)

    with pytest.raises(WouldDeadlock):
        engine.submit(work).result(LONG)


def test_work_that_hangs_is_left_behind() -> None:
    engine = Engine("engine", grace=0.05)
    stuck, started = threading.Event(), threading.Event()

    def hang() -> None:
        started.set()
        stuck.wait()

    future = engine.submit(anyio.to_thread.run_sync, hang, name="hung write")
    assert started.wait(LONG)
    with pytest.raises(DeadlineExceeded, match="hung write"):
        engine.close(0)
    assert isinstance(future.exception(), DeadlineExceeded)
    engine.close(LONG)
    thread = engine._thread
    stuck.set()
    assert thread is not None
    thread.join()


def test_a_closed_engine_leaves_no_thread_and_no_descriptor() -> None:
    def round_trip() -> None:
        engine = Engine("engine")
        engine.submit(asyncio.to_thread, int).result(LONG)
        engine.submit(partial(anyio.to_thread.run_sync, int)).result(LONG)
        engine.close(LONG)
        assert engine._thread is not None
        assert not engine._thread.is_alive()

    before_threads = set(threading.enumerate())
    before = open_descriptors()
    round_trip()
    for thread in set(threading.enumerate()) - before_threads:
        thread.join()  # anyio's idle worker was told to stop, and nobody waits for it
    assert open_descriptors() <= before


def test_asynchronous_generators_are_closed() -> None:
    engine, ended = Engine("engine"), []

    async def generate() -> Any:
        try:
            yield 1
        finally:
            await asyncio.sleep(0)
            ended.append(1)

    kept = generate()
    assert engine.submit(anext, kept).result(LONG) == 1
    engine.close(LONG)
    assert ended == [1]


# ── fork ──


def in_child(check: Callable[[], object]) -> None:
    """Fork, run ``check`` in the child, and expect it to end well and soon."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: forking beside threads, which is what we test
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            check()
            code = 0
        except BaseException:  # noqa: BLE001 - the child must not run the parent's pytest
            traceback.print_exc()
        finally:
            os._exit(code)
    watched = os.pidfd_open(pid)
    if not select.select([watched], [], [], LONG)[0]:
        os.kill(pid, signal.SIGKILL)
    os.close(watched)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_after_a_fork_the_engine_refuses_and_its_exit_waits_for_nothing() -> None:
    engine = Engine("engine", drain=lambda: threading.Event().wait(), exit_deadline=LONG)
    done, pending = engine.submit(add, 1, 2), engine.submit(forever)
    done.result(LONG)

    def check() -> None:
        assert done.result() == 3
        assert asyncio.run(done._wait()) == 3
        for call in (
            pending.result,
            pending.exception,
            pending.cancel,
            lambda: pending.add_done_callback(print),
            lambda: asyncio.run(pending._wait()),
            lambda: engine.submit(add, 1, 2),
            lambda: engine.call(print),
            lambda: engine.future("x"),
        ):
            with pytest.raises(Closed, match="fork"):
                call()
        engine.close(LONG)
        own = Engine("own")
        assert own.submit(add, 1, 2).result(LONG) == 3
        own.close(LONG)
        threading._shutdown()  # type: ignore[attr-defined]  # what multiprocessing's children call at their end

    holds, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with engine._lock:  # in the child nobody ever releases it
            holds.set()
            forked.wait(LONG)

    holding = threading.Thread(target=hold)
    holding.start()
    assert holds.wait(LONG)
    try:
        in_child(check)
    finally:
        forked.set()
        holding.join()
    engine.close(0)
