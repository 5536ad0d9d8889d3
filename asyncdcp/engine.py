"""The engine: one thread with its own event loop, where all work of a checkpointer runs.

It makes futures, runs coroutine functions for them, calls their callbacks, and waits at exit for what is pending.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from functools import partial
from typing import Any, TypeVar, TypeVarTuple
from weakref import WeakSet

import anyio

from asyncdcp.callbacks import CallbackThread
from asyncdcp.closing import exit_hook
from asyncdcp.errors import Cancelled, Closed, DeadlineExceeded, WouldDeadlock, foreign_error
from asyncdcp.futures import CheckpointFuture, work_of

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_logger = logging.getLogger(__name__)


class _Stop(Exception):
    """Carries a SystemExit or KeyboardInterrupt of the work past asyncio, whose loop would end by it."""


class Engine:
    """One thread with its own asyncio event loop, where all work of a checkpointer runs.

    Guaranteed:

    - The thread starts with the first work, and nobody's blocked loop delays it.
    - Work sees a new, empty ``contextvars`` context: nothing of the caller's but the arguments.
    - ``close`` waits for pending work, then cancels it; it resolves every future that is left; it never hangs.
    - At interpreter exit an engine that was not closed calls ``drain`` and then closes itself with ``exit_deadline``,
      while threads and executors still work. An engine closed before has nothing to do with the exit.
    - After ``os.fork()`` the child has no engine: every call raises ``Closed``, ``close`` does nothing, its exit waits
      for nothing.

    ``drain`` is the owner's last word at exit, with a deadline of its own; it is held until the engine closes, so an
    owner that wants to be collected before gives a weak method. ``grace`` is how many seconds cancelled work gets to
    clean up. The loop is asyncio's own whatever policy the process has set; work may block in ``anyio.to_thread``,
    ``asyncio.to_thread`` and the loop's default executor. All these threads and the engine's are daemons (they inherit
    it): the exit hook does the waiting, and a storage that hangs must not hold the interpreter beyond its deadline.
    """

    def __init__(
        self,
        name: str,
        *,
        drain: Callable[[], object] | None = None,
        exit_deadline: float = 60.0,
        grace: float = 5.0,
    ) -> None:
        self.name = name
        self._drain = drain
        self._exit_deadline = exit_deadline
        self._grace = grace
        self._pid = os.getpid()
        self._prefix = f"{name}-{id(self):x}"
        self._lock = threading.RLock()
        self._loop: asyncio.SelectorEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closing = self._ended = self._abandoned = False
        self._stop_by = 0.0
        self._stopping = asyncio.Event()
        self._tasks: dict[CheckpointFuture[Any], asyncio.Task[Any]] = {}
        self._scopes: dict[CheckpointFuture[Any], anyio.CancelScope] = {}
        self._pending: WeakSet[CheckpointFuture[Any]] = WeakSet()
        self._callbacks = CallbackThread(f"{name}-callbacks")

    # ── work ──

    def submit(
        self,
        fn: Callable[[*Ts], Awaitable[T]],
        *args: *Ts,
        name: str | None = None,
        cancel: Callable[[], object] | None = None,
    ) -> CheckpointFuture[T]:
        """Start ``await fn(*args)`` on the engine's loop, after everything submitted before, and return its future.

        ``future.cancel()`` cancels an ``anyio.CancelScope`` around the work, or calls ``cancel`` on the loop where
        given. So cancelled work waits for its ``anyio.to_thread`` calls, whose buffers are in use until they return
        (those of ``asyncio.to_thread`` go on alone), and clean-up that awaits is shielded by a scope. Work that is
        cancelled before it has begun still begins, and ends where it first waits. Cancelled work resolves to
        ``Cancelled``.

        Raises ``Closed`` once ``close`` was called; only work that is pending may start more then, on the loop.
        """
        self.check_process()  # first of all: in a forked child the lock may be held for good
        with self._lock:
            if self._closing and not self._on_loop():
                raise Closed(f"{self.name} is closed")
            future: CheckpointFuture[T] = self.future(name or str(getattr(fn, "__qualname__", fn)), cancel=cancel)
            if cancel is None:
                future._cancel = partial(self._cancel_work, future)
            self.call(self._launch, future, fn, args)
        return future

    def future(self, name: str, *, cancel: Callable[[], object] | None = None) -> CheckpointFuture[Any]:
        """A future that the owner resolves with ``resolve`` or ``fail``.

        ``close`` does not wait for it, but resolves it to ``Cancelled`` if nobody else has.
        """
        self.check_process()
        made: CheckpointFuture[Any] = CheckpointFuture(self, name, cancel)
        with self._lock:
            if self._ended:
                raise Closed(f"{self.name} is closed")
            self._pending.add(made)
        return made

    def call(self, fn: Callable[[*Ts], object], *args: *Ts) -> None:
        """Call ``fn(*args)`` soon on the engine's loop, in order of calls, from any thread.

        Possible until the last work has ended; then ``Closed``. What is accepted is run; its exceptions are logged.
        """
        self.check_process()
        with self._lock:
            self._ensure_loop().call_soon_threadsafe(fn, *args, context=Context())

    def schedule(self, context: Context, fn: Callable[[], object]) -> None:
        """Run ``fn`` in ``context`` on the callback thread, after everything scheduled before."""
        self._callbacks.schedule(context, fn)

    def callback(self, fn: Callable[[T], object]) -> Callable[[T], None]:
        """``fn`` for use from the engine's threads: its calls go to the callback thread, in the context of this call.

        While one call waits, later ones replace it, so that a slow ``fn`` sees the latest and delays nobody.
        """
        context, lock, latest = copy_context(), threading.Lock(), deque[T](maxlen=1)

        def run() -> None:
            with lock:
                argument = latest.pop()
            fn(argument)

        def later(argument: T) -> None:
            with lock:
                waiting = bool(latest)
                latest.append(argument)
            if not waiting:
                self.schedule(context, run)

        return later

    def owns_current_thread(self) -> bool:
        """Whether this thread runs the engine's loop or its done callbacks, so that blocking for either deadlocks."""
        return self._on_loop() or threading.get_ident() == self._callbacks.ident

    def _on_loop(self) -> bool:
        return self._thread is threading.current_thread()  # numbers of ended threads are given out anew

    @property
    def started(self) -> bool:
        """Whether there was any work yet, so that there is a thread to end."""
        return self._loop is not None

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child's copy, which has no thread and whose locks nobody may ever release."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        if os.getpid() != self._pid:
            raise Closed(
                f"{self.name} belongs to process {self._pid} and did not survive the fork into this one "
                f"({os.getpid()}): make a new checkpointer here"
            )

    def forget(self, future: CheckpointFuture[Any]) -> None:
        with self._lock:
            self._pending.discard(future)

    # ── on the loop ──

    def _launch(self, future: CheckpointFuture[T], fn: Callable[[*Ts], Awaitable[T]], args: tuple[*Ts]) -> None:
        assert self._loop is not None
        task = self._tasks[future] = self._loop.create_task(self._work(future, fn, args), name=future.name)
        task.add_done_callback(partial(self._settle, future))

    def _settle(self, future: CheckpointFuture[T], task: asyncio.Task[T]) -> None:
        """Carry the outcome of ``task`` over, unless the engine has given it up already."""
        del self._tasks[future]
        self._scopes.pop(future, None)
        if task.cancelled():
            future.fail(Cancelled(f"{future.name} was cancelled"))
        elif (error := task.exception()) is not None:
            stop = error.__cause__ if isinstance(error, _Stop) else None
            future.fail(stop or error)
        else:
            future.resolve(task.result())

    async def _work(self, future: CheckpointFuture[T], fn: Callable[[*Ts], Awaitable[T]], args: tuple[*Ts]) -> T:
        work_of.set(future)
        with anyio.CancelScope() as self._scopes[future]:
            del future  # which has the error, whose traceback has this
            try:
                return await fn(*args)
            except (SystemExit, KeyboardInterrupt) as stop:
                raise _Stop from stop
        raise asyncio.CancelledError  # the scope was cancelled, and the work ended by it

    def _cancel_work(self, future: CheckpointFuture[Any]) -> None:
        if (scope := self._scopes.get(future)) is not None:
            scope.cancel()
        elif future in self._tasks:  # it begins first, so that who waits for its part hears that there is none
            asyncio.get_running_loop().call_soon(self._cancel_work, future)

    async def _main(self) -> None:
        with anyio.CancelScope():  # anyio loads its backend here: where it cannot, no work has begun
            await self._stopping.wait()
        while self._tasks and (left := self._stop_by - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait(self._tasks.values(), timeout=left)
        while self._tasks:  # no deadline: who closes has one, and leaves this thread behind when it has passed
            for future in self._tasks:
                self._cancel_work(future)
            await asyncio.wait(self._tasks.values())
        with self._lock:
            self._ended = True
        await asyncio.sleep(0)  # what call() had accepted runs

    # ── beginning and end ──

    def _ensure_loop(self) -> asyncio.SelectorEventLoop:
        """The loop, started if it was not; ``Closed`` after the end. Under the lock."""
        if self._ended:
            raise Closed(f"{self.name} is closed")
        if self._loop is None:
            exit_hook.add(self)
            self._loop = asyncio.SelectorEventLoop()
            # A context of its own, so that free-threaded builds do not hand the caller's on to the thread.
            self._thread = threading.Thread(target=Context().run, args=(self._run,), name=self.name, daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:
                self._end()
                self._loop.close()
                self._thread = None
                raise Closed(f"{self.name} cannot start its thread: {error}") from error
        return self._loop

    def _run(self) -> None:
        loop = self._loop
        assert loop is not None
        # The runner cancels stray tasks, then shuts down asynchronous generators and the default executor.
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                loop.set_default_executor(ThreadPoolExecutor(thread_name_prefix=self._prefix))
                try:
                    runner.run(self._main())
                except BaseException as error:  # said before the runner cancels what is left
                    _logger.exception("%s ended by an error", self.name)
                    self._end(foreign_error(f"the work of {self.name}", error))
        finally:
            self._end()

    def _end(self, error: BaseException | None = None) -> None:
        """Accept nothing more, and resolve what is left."""
        with self._lock:
            self._closing = self._ended = True
            left = list(self._pending)
        for future in left:
            future.fail(error or Cancelled(f"{future.name} was not done when {self.name} closed"))
        self._drain = None
        exit_hook.remove(self)

    def close(self, deadline: float) -> None:
        """Refuse new work, wait ``deadline`` seconds for what is pending, cancel the rest, and end the thread.

        Returns when the thread has ended and the done callbacks have run. Work that goes on ``grace`` seconds after it
        was cancelled is left behind: its futures fail with ``DeadlineExceeded``, which is raised here too. Idempotent,
        from any thread but the engine's own (``WouldDeadlock``); of several closing at a time the first sets the
        deadline of the work, and each waits no longer than its own.
        """
        if os.getpid() != self._pid:
            return
        if self.owns_current_thread():
            raise WouldDeadlock(f"{self.name} cannot be closed on its own thread, which the closing waits for")
        until = time.monotonic() + deadline + self._grace
        with self._lock:
            first, self._closing = not self._closing, True
            if self._thread is None:
                self._end()
            elif first and self._loop is not None and not self._ended:
                self.call(self._stop, deadline)
        if self._thread is None or self._abandoned:
            return
        self._thread.join(_left(until))
        if self._thread.is_alive():
            raise self._abandon(deadline)
        if not self._callbacks.join(_left(until)):
            raise DeadlineExceeded(f"{self.name}: done callbacks did not end within deadline={deadline} s")

    def _stop(self, deadline: float) -> None:
        self._stop_by = asyncio.get_running_loop().time() + deadline
        self._stopping.set()

    def _abandon(self, deadline: float) -> DeadlineExceeded:
        """Leave the thread behind as it is. Its executor's threads must not hold the interpreter at exit either."""
        with self._lock:
            self._abandoned = True
            names = ", ".join(sorted(future.name for future in self._pending)) or "clean-up (threads still busy)"
        error = DeadlineExceeded(
            f"{self.name} did not end within deadline={deadline} s and {self._grace} s after cancelling: {names}"
        )
        self._end(error)
        # concurrent.futures joins every thread in this table at exit, daemon or not, and has no public way out.
        joined = getattr(concurrent.futures.thread, "_threads_queues", {})
        for thread in threading.enumerate():
            if thread.name.startswith(self._prefix):
                joined.pop(thread, None)
        return error

    def finish(self) -> None:
        """The end at interpreter exit: the owner's ``drain``, then ``close``. Raises nothing; logs what went wrong."""
        if os.getpid() != self._pid:
            return
        try:
            if self._drain is not None:
                self._drain()
        except Exception as error:
            text = "%s was not closed before the program ended, which is too late to raise this (close() would): %s"
            _logger.exception(text, self.name, error)
        except BaseException:  # Control-C: whoever waits for the exit wants no more of it
            _logger.exception("%s: pending work was given up at interpreter exit", self.name)
            self._abandon(0)
            return
        try:
            self.close(self._exit_deadline)
        except BaseException:
            _logger.exception("%s: pending work was given up at interpreter exit", self.name)
            self._abandon(self._exit_deadline)


def _left(until: float) -> float:
    return min(max(0.0, until - time.monotonic()), threading.TIMEOUT_MAX)
