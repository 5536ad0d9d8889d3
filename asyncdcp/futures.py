"""Futures that any event loop can await.

A verb returns a ``CheckpointFuture``. ``await`` it in a coroutine, on asyncio, uvloop or trio, or call ``result()`` in
a plain function. Work and waiting are apart: who waits may be cancelled, time out or lose its loop, and the work knows
nothing of it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar, copy_context
from functools import partial
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar, TypeVarTuple, cast

import anyio
from anyio.lowlevel import current_token

from asyncdcp.errors import Cancelled, Closed, DeadlineExceeded, WouldDeadlock

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_logger = logging.getLogger(__name__)

work_of: ContextVar[CheckpointFuture[Any]] = ContextVar("work_of")
"""Within work that was submitted to an engine: the future of it, whose ``report`` the work may set."""


class FutureHost(Protocol):
    """What a future needs of the engine that made it."""

    def check_process(self) -> None:
        """Raises ``Closed`` in a forked child."""
        ...

    def call(self, fn: Callable[[*Ts], object], *args: *Ts) -> None:
        """Calls ``fn`` on the host's loop."""
        ...

    def schedule(self, context: Context, fn: Callable[[], object]) -> None:
        """Runs ``fn`` on the host's callback thread."""
        ...

    def owns_current_thread(self) -> bool:
        """Whether blocking here for a future would deadlock."""
        ...

    def forget(self, future: CheckpointFuture[Any]) -> None:
        """``future`` is done."""
        ...


class CheckpointFuture(Generic[T]):
    """What a verb comes to: a value or an error, resolved once and from any thread.

    Guaranteed:

    - ``await`` works on asyncio, uvloop and trio, by any number of tasks on any number of loops. Cancelling a task that
      awaits leaves the work and every other waiter alone, and leaves nothing behind.
    - It is resolved at the latest when its engine closes.
    - Every waiter gets the same outcome; an error is raised with the traceback of the work, however often.
    - In a process made by ``os.fork()`` a future that was done can be read; everything else raises ``Closed``.

    Made by ``Engine.submit`` and ``Engine.future``, never by a user. ``name`` says in messages what it is.

    >>> with asyncdcp.AsyncCheckpointer(process=False) as checkpointer:
    ...     _ = checkpointer.save("there", {"weight": torch.ones(3)}).result()
    ...     future = checkpointer.load("there")  # or: await it, on any loop
    ...     print(future.result(timeout=60), future.report.read_bytes)
    {'weight': tensor([1., 1., 1.])} 12
    """

    report: Any
    """Sizes and timings of what was done: a ``LoadReport`` of a load, a ``ReceiveReport`` of a transport. None until
    then, and of verbs that have none.
    """

    def __init__(self, host: FutureHost, name: str, cancel: Callable[[], object] | None) -> None:
        self.name = name
        self.report = None
        self._host = host
        self._cancel = cancel
        self._cancel_asked = False
        self._lock = threading.RLock()  # reentrant: a signal handler may call what the main thread is in
        self._done = False
        self._resolved = threading.Event()
        self._value: T | None = None
        self._failure: BaseException | None = None
        self._traceback: TracebackType | None = None
        self._retrieved = False
        self._waiting = 0
        self._wakers: dict[anyio.Event, object] = {}
        self._callbacks: list[tuple[Context, Callable[[CheckpointFuture[T]], object]]] = []

    def __repr__(self) -> str:
        state = "pending" if not self._done else "failed" if self._failure is not None else "done"
        return f"<CheckpointFuture {self.name!r} {state}>"

    # ── waiting ──

    def __await__(self) -> Generator[Any, Any, T]:
        return self._wait().__await__()

    async def _wait(self) -> T:
        try:
            if not self._done:
                self._host.check_process()  # first of all: in a forked child a lock may be held for good
                with self._awaiting():
                    await self.settled()
                    self._retrieved = True  # while it is awaited: at no moment is the error nobody's
            return self._outcome()
        finally:
            del self  # it has the error, whose traceback has this frame

    async def settled(self) -> None:
        """Returns once it is done, however. For the owner: it does not count as seeing an error, nor as waiting."""
        if self.done():
            return
        self._host.check_process()
        event, token = anyio.Event(), current_token().native_token
        with self._lock:
            if self._done:
                return
            self._wakers[event] = token
        try:
            await event.wait()
        finally:
            with self._lock:
                self._wakers.pop(event, None)

    @contextmanager
    def _awaiting(self) -> Iterator[None]:
        """Somebody waits for the outcome."""
        with self._lock:
            self._waiting += 1
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1

    def result(self, timeout: float | None = None) -> T:
        """Block until it is done and return the value or raise the error.

        Raises ``DeadlineExceeded`` (a ``TimeoutError``) after ``timeout`` seconds; the work goes on. Raises
        ``WouldDeadlock`` on the engine's own thread and in a done callback, where the wait might never end.
        """
        try:
            self._block(timeout)
            return self._outcome()
        finally:
            del self

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Block like ``result`` and return the error, or None where there is a value."""
        self._block(timeout)
        self._retrieved = True
        return self._failure

    def _block(self, timeout: float | None) -> None:
        if self._done:
            return
        self._host.check_process()
        if self._host.owns_current_thread():
            raise WouldDeadlock(
                f"{self.name}: blocking here would wait for this very thread; await the future, or give the wait to "
                "a thread of your own"
            )
        with self._awaiting():
            if not self.wait(timeout):
                raise DeadlineExceeded(f"{self.name} was not done within timeout={timeout} s")
            self._retrieved = True

    def _outcome(self) -> T:
        if self._failure is None:
            return cast(T, self._value)
        self._retrieved = True
        # The traceback of the work alone: else each raise would add the frames of another waiter, and keep them alive.
        try:
            raise self._failure.with_traceback(self._traceback)
        finally:
            del self

    # ── state ──

    def done(self) -> bool:
        """Whether there is an outcome; then ``result()`` returns at once."""
        return self._done

    @property
    def failed(self) -> bool:
        """Whether it is done, with an error; asking does not count as seeing the error."""
        return self._failure is not None

    @property
    def failure(self) -> BaseException | None:
        """The error if it failed. For the owner: reading it here does not count as seeing it."""
        return self._failure

    def wait(self, timeout: float | None = None) -> bool:
        """Block like ``result``, but only for being done, which it returns. Does not count as seeing an error."""
        if not self._done and self._host.owns_current_thread():
            raise WouldDeadlock(f"{self.name} cannot be waited for here: this thread is the one that would resolve it")
        return self._resolved.wait(None if timeout is None else min(timeout, threading.TIMEOUT_MAX))

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for the outcome, or was woken by it and has not run yet: it is theirs to see."""
        return self._waiting > 0

    def cancelled(self) -> bool:
        """Whether it was given up: the error is ``Cancelled``."""
        return isinstance(self._failure, Cancelled)

    @property
    def unseen_failure(self) -> BaseException | None:
        """The error, as long as nobody got it from ``await``, ``result`` or ``exception``; else None.

        For the owner, so that no error is lost; reading it here does not count as seeing it.
        """
        return None if self._retrieved else self._failure

    def mark_seen(self) -> None:
        """Count the error as seen: the owner has raised or reported it by another way."""
        self._retrieved = True

    def cancel(self) -> bool:
        """Ask the owner to give up; True if it was asked, False if it is done or the work cannot be given up.

        Returns at once. The outcome decides: ``Cancelled``, or the value where the work was faster. The owner's
        callable is called once, on the engine's loop.
        """
        if self._done:
            return False
        self._host.check_process()
        with self._lock:
            cancel, again, self._cancel_asked = self._cancel, self._cancel_asked, True
        if cancel is None or self._done:
            return False
        if not again:
            try:
                self._host.call(cancel)
            except Closed:
                return False
        return True

    def add_done_callback(self, fn: Callable[[CheckpointFuture[T]], object]) -> None:
        """Call ``fn(future)`` once it is done, in the ``contextvars`` context of this call.

        Callbacks of all futures of an engine run one after another on a thread of their own; those of one future in the
        order they were added, also when added after it was done. An exception in one is logged; nothing else suffers.
        """
        self._host.check_process()
        with self._lock:  # scheduling under the lock keeps the order against a resolution on another thread
            if self._done:
                self._host.schedule(copy_context(), partial(fn, self))
            else:
                self._callbacks.append((copy_context(), fn))

    # ── the owner's side ──

    def resolve(self, value: T) -> bool:
        """Resolve it unless it is done; whether it was resolved here. For the owner, from any thread; blocks for
        nobody's loop.
        """
        return self._resolve(value, None)

    def fail(self, error: BaseException) -> bool:
        """As ``resolve``, with an error."""
        return self._resolve(None, error)

    def _resolve(self, value: T | None, failure: BaseException | None) -> bool:
        with self._lock:
            if self._done:
                return False
            self._value, self._failure = value, failure
            self._traceback = None if failure is None else failure.__traceback__
            self._done, self._cancel = True, None
            wakers, self._wakers = self._wakers, {}
            callbacks, self._callbacks = self._callbacks, []
            for context, fn in callbacks:
                self._host.schedule(context, partial(fn, self))
        self._host.forget(self)
        self._resolved.set()
        for event, token in wakers.items():
            _wake(event, token)
        return True


def _wake(event: anyio.Event, token: object) -> None:
    """Set ``event`` on the loop of ``token`` without waiting for it; a loop that was closed meanwhile does no harm."""
    if isinstance(token, asyncio.AbstractEventLoop):
        try:
            token.call_soon_threadsafe(event.set)
        except RuntimeError:
            if not token.is_closed():
                _logger.exception("cannot wake a task that awaits a CheckpointFuture")
        return
    from trio import RunFinishedError  # it is there: the token is trio's
    from trio.lowlevel import TrioToken

    with suppress(RunFinishedError):
        cast(TrioToken, token).run_sync_soon(event.set)
