"""CheckpointFuture awaited on every loop, by several tasks, by loops that end meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trio
import uvloop

from asyncdcp.engine import Engine
from tests.work import add, fail


def on_asyncio(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(main())


def on_uvloop(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


LOOPS = pytest.mark.parametrize("run", [on_asyncio, on_uvloop, trio.run])


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
            await anyio.to_thread.run_sync(future.resolve, 7)
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
        future.resolve(1)
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
    future.resolve(5)
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
    future.resolve(1)
    assert future.result() == 1
    assert not caplog.records


def test_a_trio_loop_over_meanwhile_does_no_harm(engine: Engine) -> None:
    future = engine.future("it")

    async def main() -> None:
        future._wakers[anyio.Event()] = trio.lowlevel.current_trio_token()

    trio.run(main)
    future.resolve(1)
    assert future.result() == 1


async def test_works_with_gather_and_wait_for(engine: Engine) -> None:
    assert list(await asyncio.gather(engine.submit(add, 1, 1), engine.submit(add, 2, 2))) == [2, 4]
    future = engine.future("it")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(future, 0)
    assert not future._wakers
    assert not future.done()
