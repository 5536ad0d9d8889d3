"""Cancelled callers learn of it when their call has ended, and not before."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from asyncdcp.threads import on_executor, on_thread


class Stuck:
    """A blocking call that has begun and ends only when it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.begun = threading.Event()
        self.release = threading.Event()
        self.ended = False
        self.error = error

    def __call__(self) -> str:
        self.begun.set()
        assert self.release.wait(30)
        self.ended = True
        if self.error:
            raise self.error
        return "result"


Run = Callable[[Callable[[], str]], Awaitable[str]]


@pytest.fixture(params=["executor", "thread"])
def run(request: pytest.FixtureRequest) -> Run:
    limiter = anyio.CapacityLimiter(2)
    return on_executor if request.param == "executor" else lambda call: on_thread(limiter, call)


async def begun(call: Stuck) -> None:
    assert await asyncio.to_thread(call.begun.wait, 30)


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_result_and_error(run: Run) -> None:
    for error in (None, OSError("no"), EOFError()):
        call = Stuck(error)
        call.release.set()
        if error is None:
            assert await run(call) == "result"
        else:
            with pytest.raises(type(error)):
                await run(call)


@pytest.mark.parametrize("error", [None, OSError("no")])
async def test_task_cancel_waits_for_the_end(run: Run, error: Exception | None) -> None:
    call = Stuck(error)
    task = asyncio.ensure_future(run(call))
    await begun(call)
    for _ in range(3):
        task.cancel()
        await turns()
        assert not task.done()
    call.release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert call.ended and task.cancelled()


async def test_cancelled_scope_waits_for_the_end(run: Run) -> None:
    call = Stuck()
    results: list[str] = []
    with anyio.CancelScope() as scope:

        async def cancel() -> None:
            await begun(call)
            scope.cancel()
            await turns()
            assert not results
            call.release.set()

        helper = asyncio.create_task(cancel())
        results.append(await run(call))
        await anyio.lowlevel.checkpoint()
        pytest.fail("not cancelled")
    await helper
    assert call.ended and results == ["result"]


async def test_cancelled_before_a_thread_is_free_it_never_runs() -> None:
    limiter = anyio.CapacityLimiter(1)
    first, second = Stuck(), Stuck()
    holder = asyncio.create_task(on_thread(limiter, first))
    await begun(first)
    waiter = asyncio.create_task(on_thread(limiter, second))
    await turns()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    first.release.set()
    assert await holder == "result"
    assert not second.begun.is_set()


@contextmanager
def threads_that_stand_still() -> Iterator[None]:
    """As soon as they have reported."""
    loop, release = asyncio.get_running_loop(), threading.Event()
    report = loop.call_soon_threadsafe

    def and_stand_still(*args: Any, **options: Any) -> Any:
        handle = report(*args, **options)
        assert release.wait(30)
        return handle

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "call_soon_threadsafe", and_stand_still)
        try:
            yield
        finally:
            release.set()


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_worker_thread_that_has_reported_keeps_neither_call_nor_result(cancelled: bool) -> None:
    given, made = Stuck(), list[weakref.ref[Stuck]]()

    def call(waits: Stuck) -> Stuck:
        waits()
        result = Stuck()
        made.append(weakref.ref(result))
        return result

    kept = weakref.ref(given)
    work = asyncio.ensure_future(on_thread(anyio.CapacityLimiter(1), call, given))
    await begun(given)
    with threads_that_stand_still():
        if cancelled:
            work.cancel()
            await turns()
        given.release.set()
        await asyncio.wait((work,))
        assert work.cancelled() == cancelled
        if not cancelled:
            assert work.result() is made[0]()
        del given, work
        assert (kept(), made[0]()) == (None, None)


async def test_clean_up_runs_though_cancelled() -> None:
    call = Stuck()
    call.release.set()
    with anyio.CancelScope() as scope:
        scope.cancel()
        assert await on_executor(call) == "result"
    task = asyncio.create_task(on_executor(call := Stuck()))
    await turns(1)
    task.cancel()
    call.release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert call.ended
