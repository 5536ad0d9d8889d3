"""Blocking calls off the loop, for asyncio: whoever is cancelled meanwhile learns of it only when the call has ended.

Two ways to be cancelled are covered. A cancel scope of anyio is held off by a shield. A task's own ``cancel()`` passes
through every shield, ``anyio.to_thread`` included, while the thread goes on; so here it is caught, the call's end
awaited, and the cancellation raised then. A caller may therefore free, on any exception, what the call used.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TypeVar, TypeVarTuple

from aiofiles.os import wrap
from anyio import CancelScope, CapacityLimiter, to_thread
from anyio.lowlevel import current_token

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_logger = logging.getLogger("asyncdcp")


async def on_executor(function: Callable[[*Ts], T], *args: *Ts) -> T:
    """Calls the function on aiofiles' executor: for directories and small files, and for cleaning up.

    It is always run, to its end, even if the caller is cancelled already. Under an anyio scope the result is then
    returned, and the cancellation follows at the next await; after ``Task.cancel`` it is raised in its place.
    """
    return await ended(asyncio.ensure_future(wrap(function)(*args)))


async def on_thread(limiter: CapacityLimiter, function: Callable[[*Ts], T], *args: *Ts) -> T:
    """Calls the function on a worker thread of anyio: for the bytes of large objects, ``limiter.total_tokens`` at once.

    Cancelled before it began, the function is never run.
    """
    job: Future[None] = Future()
    call: list[Callable[[], T]] = [partial(function, *args)]
    found: list[T] = []
    try:
        await to_thread.run_sync(_perform, job, call, found, limiter=limiter)
    except asyncio.CancelledError:
        if not job.cancel():
            with suppress(Exception):
                await ended(asyncio.wrap_future(job))
        raise
    else:
        job.result()
        return found.pop()
    finally:
        call.clear()
        found.clear()


async def uncut(function: Callable[[], T]) -> T:
    """Calls the function on a thread and returns when it has, on whatever loop (asyncio, trio) and however cancelled.

    Cancellation follows at the next await, or after ``Task.cancel`` in place of the result; an error of the function,
    whose place it takes, is logged.
    """
    if isinstance(current_token().native_token, asyncio.AbstractEventLoop):
        work = asyncio.ensure_future(to_thread.run_sync(function))
        try:
            return await ended(work)
        except asyncio.CancelledError:
            if not work.cancelled() and (error := work.exception()) is not None:
                _logger.error("it failed, and who waited for it was cancelled", exc_info=error)
            raise
    return await to_thread.run_sync(function)  # shielded by anyio, and trio has no other way to cancel


def _perform(job: Future[None], call: list[Callable[[], T]], found: list[T]) -> None:
    """Takes the call out of its list, and who waits for the result empties both: a worker thread keeps what it was
    given for a while longer, and the call or its result may hold a whole state.
    """
    if job.set_running_or_notify_cancel():
        try:
            found.append(call.pop()())
            job.set_result(None)
        except BaseException as error:  # noqa: BLE001  # handed on whole by job.result()
            job.set_exception(error)


async def ended(work: asyncio.Future[T]) -> T:
    """The result of what is never cancelled itself; a cancellation of the caller is raised once it has ended.

    Under an anyio scope the result is returned, and the cancellation follows at the next await.
    """
    cancelled: asyncio.CancelledError | None = None
    with CancelScope(shield=True):
        while not work.done():
            try:
                await asyncio.wait((work,))
            except asyncio.CancelledError as error:
                cancelled = error
    try:
        if cancelled is None:
            return work.result()
        work.exception()  # looked at, so that asyncio does not report it as lost
        raise cancelled
    finally:
        del cancelled, work  # their errors hold this frame, and with it the buffers of all that wait here
