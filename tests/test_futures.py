"""CheckpointFuture on every loop and thread, the engine's life, and what happens at fork and interpreter exit."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import InvalidStateError
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trio
import uvloop

from asyncdcp.engine import Engine
from asyncdcp.errors import Cancelled, Closed, DeadlineExceeded, WouldDeadlock
from asyncdcp.futures import CheckpointFuture

LONG = 150.0  # a deadline that only a failing test reaches: a cold cache makes importing torch take half a minute


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine("engine", exit_deadline=0, grace=LONG)
    yield made
    made.close(LONG)


def on_asyncio(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(main())


def on_uvloop(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


LOOPS = pytest.mark.parametrize("run", [on_asyncio, on_uvloop, trio.run])


async def add(a: int, b: int) -> int:
    return a + b


async def fail(message: str) -> None:
    raise ValueError(message)


async def forever() -> None:
    await anyio.sleep_forever()


# ── await ──


@LOOPS
def test_await_a_result_an_error_and_what_is_done(engine: Engine, run: Any) -> None:
    async def main() -> None:
        work = engine.submit(add, 1, 2)
        assert await work == 3
        assert await work == 3
        with pytest.raises(ValueError, match="oh"):
            await engine.submit(fail, "oh")

    run(main)


@LOOPS
def test_resolved_by_another_thread_while_awaited(engine: Engine, run: Any) -> None:
    future = engine.future("it")

    async def main() -> None:
        got: list[int] = []

        async def wait() -> None:
            got.append(await future)

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            assert len(future._wakers) == 2
            await anyio.to_thread.run_sync(future.set_result, 7)
        assert got == [7, 7]

    run(main)
    assert not future._wakers


@LOOPS
def test_a_cancelled_waiter_leaves_the_work_and_nothing_behind(engine: Engine, run: Any) -> None:
    future = engine.future("it")

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(future._wait)
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
        assert not future._wakers
        assert not future.done()
        future.set_result(1)
        assert await future == 1

    run(main)


def test_tasks_on_three_loops_await_one_future(engine: Engine) -> None:
    future = engine.future("it")
    ready = threading.Semaphore(0)
    got: list[int] = []

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            ready.release()

    async def wait() -> None:
        got.append(await future)

    threads = [threading.Thread(target=run, args=(main,)) for run in (on_asyncio, on_uvloop, trio.run)]
    for thread in threads:
        thread.start()
    for _ in threads:
        ready.acquire()
    future.set_result(5)
    for thread in threads:
        thread.join()
    assert got == [5, 5, 5]


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_asyncio_loop_closed_meanwhile_does_no_harm(engine: Engine, new_loop: Any, caplog: Any) -> None:
    future = engine.future("it")
    loop = new_loop()

    async def main() -> None:
        task = asyncio.ensure_future(future)
        await anyio.wait_all_tasks_blocked()
        event, token = next(iter(future._wakers.items()))
        task.cancel()
        await asyncio.wait([task])
        future._wakers[event] = token  # as when resolving and closing coincide

    loop.run_until_complete(main())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
    future.set_result(1)
    assert future.result() == 1
    assert not caplog.records


def test_a_trio_loop_over_meanwhile_does_no_harm(engine: Engine) -> None:
    future = engine.future("it")

    async def main() -> None:
        future._wakers[anyio.Event()] = trio.lowlevel.current_trio_token()

    trio.run(main)
    future.set_result(1)
    assert future.result() == 1


async def test_works_with_gather_and_wait_for(engine: Engine) -> None:
    assert list(await asyncio.gather(engine.submit(add, 1, 1), engine.submit(add, 2, 2))) == [2, 4]
    future = engine.future("it")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(future, 0)
    assert not future._wakers
    assert not future.done()


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

    other.set_result(1)
    assert engine.submit(block_on_done).result(LONG) == 1


def test_blocking_in_a_done_callback_is_refused(engine: Engine) -> None:
    other, seen = engine.future("other"), engine.future("seen")

    def callback(_: object) -> None:
        try:
            other.exception()
        except WouldDeadlock as error:
            seen.set_result(error)

    engine.submit(add, 1, 2).add_done_callback(callback)
    assert isinstance(seen.result(LONG), WouldDeadlock)


def test_resolved_exactly_once(engine: Engine) -> None:
    future = engine.future("it")
    future.set_result(1)
    with pytest.raises(InvalidStateError):
        future.set_result(2)
    with pytest.raises(InvalidStateError):
        future.set_exception(ValueError())
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
    future.set_result(1)
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
    engine.call(future.set_result, 1)
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
    future.set_result(1)
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


# ── the engine ──


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
    before = len(os.listdir("/proc/self/fd"))
    round_trip()
    for thread in set(threading.enumerate()) - before_threads:
        thread.join()  # anyio's idle worker was told to stop, and nobody waits for it
    assert len(os.listdir("/proc/self/fd")) == before


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

    in_child(check)
    engine.close(0)


# ── interpreter exit ──

PRELUDE = """
import asyncio, os, sys, threading, time
import anyio, anyio.to_thread
import concurrent.futures.thread
from asyncdcp.engine import Engine
from asyncdcp.futures import CheckpointFuture
started = threading.Event()

def late(text):
    # Ends only when the exit has begun: then the main thread waits in our hook, in threading._shutdown.
    while not threading._SHUTTING_DOWN:
        time.sleep(0.001)
    print(text, flush=True)

async def save():
    started.set()
    await asyncio.to_thread(late, "to_thread")
    await asyncio.get_running_loop().run_in_executor(None, late, "executor")
    await anyio.to_thread.run_sync(late, "anyio")
    def in_thread(): print("thread", flush=True)
    thread = threading.Thread(target=in_thread); thread.start()
    await asyncio.to_thread(thread.join)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(late, "own pool").result()
    print("committed", flush=True)
"""
ALL = ["to_thread", "executor", "anyio", "thread", "own pool", "committed"]


def python(code: str, *, timeout: float = LONG) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        check=False,
    )


@pytest.mark.parametrize(
    ("end", "code", "stderr"),
    [("", 0, ""), ("raise ValueError('main')", 1, "ValueError: main"), ("sys.exit(3)", 3, "")],
)
def test_exit_waits_for_pending_work(end: str, code: int, stderr: str) -> None:
    ran = python(f"engine = Engine('engine')\nengine.submit(save)\n{end}")
    assert ran.stdout.split("\n")[:-1] == ["to_thread", "executor", "anyio", "thread", "own pool", "committed"]
    assert ran.returncode == code
    assert stderr in ran.stderr
    assert bool(ran.stderr) == bool(stderr)


def test_exit_drains_first_then_closes_the_newest_first() -> None:
    ran = python("""
        def drain(name, future=None):
            def run():
                print("drain", name, future and future.result(20))
            return run
        a = Engine("a", drain=lambda: print("drain a", a.submit(save).result(20)), exit_deadline=0)
        b = Engine("b", drain=lambda: print("drain b"))
        a.submit(asyncio.sleep, 0).result()
        b.submit(asyncio.sleep, 0).result()
    """)
    assert ran.stderr == ""
    assert ran.stdout.split("\n")[:-1] == ["drain b", *ALL, "drain a None"]


def test_a_failing_drain_is_logged_and_the_work_still_waited_for() -> None:
    ran = python("""
        engine = Engine("engine", drain=lambda: 1 // 0)
        engine.submit(save)
    """)
    assert ran.stdout.split("\n")[-2] == "committed"
    assert "ZeroDivisionError" in ran.stderr


def test_a_closed_engine_has_nothing_to_do_with_the_exit() -> None:
    ran = python("""
        engine = Engine("engine", drain=lambda: print("drain"))
        engine.submit(asyncio.sleep, 0).result()
        engine.close(10)
    """)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("", "", 0)


@pytest.mark.parametrize("thread", ["anyio.to_thread.run_sync", "asyncio.to_thread"])
def test_a_hung_storage_does_not_hold_the_exit_beyond_the_deadline(thread: str) -> None:
    ran = python(f"""
        def hang():
            started.set()
            threading.Event().wait()
        engine = Engine("engine", exit_deadline=0.05, grace=0.05)
        engine.submit({thread}, hang, name="hung write")
        started.wait()
    """)
    assert ran.returncode == 0
    assert "DeadlineExceeded" in ran.stderr
    # asyncio's thread goes on alone once its task is cancelled, anyio's task waits for it
    assert ("hung write" if thread.startswith("anyio") else "threads still busy") in ran.stderr


def test_control_c_ends_the_wait_at_exit() -> None:
    ran = python("""
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
        def interrupt():
            while not threading._SHUTTING_DOWN:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
        engine = Engine("engine", grace=0.05)
        engine.submit(asyncio.sleep, 1000)
        engine.submit(asyncio.to_thread, interrupt)
    """)
    assert "gave up" in ran.stderr or "given up" in ran.stderr
    assert ran.returncode == 0


def test_without_the_private_hook_atexit_does_it() -> None:
    ran = python("""
        del threading._register_atexit
        async def plain():
            for _ in range(10):
                await asyncio.sleep(0.01)
            print("committed", flush=True)
        engine = Engine("engine")
        engine.submit(plain)
    """)
    assert (ran.stdout, ran.stderr) == ("committed\n", "")


def test_an_engine_started_during_exit_is_refused_clearly() -> None:
    ran = python("""
        import atexit
        from asyncdcp.errors import Closed
        def late_save():
            try:
                Engine("engine").submit(save)
            except Closed as error:
                print(error)
        atexit.register(late_save)
    """)
    assert "interpreter is exiting" in ran.stdout


def test_a_forked_child_exits_without_waiting() -> None:
    ran = python("""
        engine = Engine("engine", drain=lambda: print("drain", os.getpid() == parent), exit_deadline=0)
        parent = os.getpid()
        engine.submit(asyncio.sleep, 0).result()
        pid = os.fork()
        if pid:
            print("child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    """)
    assert ran.stdout.split("\n")[:-1] == ["child 0", "drain True"]
