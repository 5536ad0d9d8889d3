"""What happens at the interpreter's exit, in interpreters of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from tests.work import LONG

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
    said = (
        "engine was not closed before the program ended, which is too late to raise this (close() would): integer div"
    )
    assert ran.stderr.startswith(said) and "ZeroDivisionError" in ran.stderr


def test_a_closed_engine_has_nothing_to_do_with_the_exit() -> None:
    ran = python("""
        engine = Engine("engine", drain=lambda: print("drain"))
        engine.submit(asyncio.sleep, 0).result()
        engine.close(10)
    """)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("", "", 0)


@pytest.mark.parametrize(
    ("thread", "before", "said"),
    [
        ("anyio.to_thread.run_sync", "", "hung write"),
        # asyncio's thread goes on alone once its task is cancelled, anyio's task waits for it
        ("asyncio.to_thread", "future.cancel(); future.exception()", "threads still busy"),
    ],
)
def test_a_hung_storage_does_not_hold_the_exit_beyond_the_deadline(thread: str, before: str, said: str) -> None:
    ran = python(f"""
        def hang():
            started.set()
            threading.Event().wait()
        engine = Engine("engine", exit_deadline=0.05, grace=0.05)
        future = engine.submit({thread}, hang, name="hung write")
        started.wait()
        {before}
    """)
    assert ran.returncode == 0
    assert "DeadlineExceeded" in ran.stderr
    assert said in ran.stderr


def test_control_c_ends_the_wait_at_exit() -> None:
    ran = python("""
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
        def interrupt():
            while not engine._closing:  # then the exit waits for it
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
