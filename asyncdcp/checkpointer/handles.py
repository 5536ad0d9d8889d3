"""SaveHandle, which ``save`` returns at once; and the handles of a checkpointer whose saves are under way, or failed
and nobody has looked, with the guards, whose steps wait for them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from asyncdcp.config import OnError
from asyncdcp.engine import Engine
from asyncdcp.errors import Cancelled, DeadlineExceeded, SaveSkipped, UnseenFailure
from asyncdcp.futures import CheckpointFuture
from asyncdcp.results import SaveResult
from asyncdcp.staging import Guard
from asyncdcp.warn import warn_caller

_logger = logging.getLogger("asyncdcp")
_STOP_SECONDS = 30.0  # a copy that is under way ends within milliseconds; if it hangs, so does the memory it reads


class SaveHandle:
    """A save under way, as its two futures.

    ``staged`` resolves (to None) when every tensor has been copied, so that the state may be changed again;
    ``committed`` resolves to a ``SaveResult`` when the checkpoint is durable. Awaiting the handle, or ``result()``, is
    that of ``committed``. If the save fails before it is staged both raise the same error. A handle unpacks into its
    two futures.

    >>> with asyncdcp.AsyncCheckpointer(process=False) as checkpointer:
    ...     staged, committed = checkpointer.save("two", {"weight": torch.ones(3)})
    ...     staged.result()  # blocks; in a coroutine: await staged
    ...     print(committed.result().tensors)
    1
    """

    def __init__(
        self,
        path: str,
        staged: CheckpointFuture[None],
        committed: CheckpointFuture[SaveResult],
        hold: Callable[[float], bool] | None = None,
    ) -> None:
        self.path = path
        self.staged = staged
        self.committed = committed
        self._hold = hold

    def hold(self, timeout: float) -> bool:
        """Blocks until the calling thread may change tensors, or enqueue work that does; whether that came. See
        ``Sources.hold``.
        """
        return self._hold is None or self._hold(min(timeout, threading.TIMEOUT_MAX))

    def __iter__(self) -> Iterator[CheckpointFuture[Any]]:
        return iter((self.staged, self.committed))

    def __await__(self) -> Generator[Any, Any, SaveResult]:
        return self.committed.__await__()

    def __repr__(self) -> str:
        stage = "staging" if not self.staged.done() else "writing" if not self.committed.done() else "settled"
        return f"<SaveHandle {self.path!r} {stage}>"

    def result(self, timeout: float | None = None) -> SaveResult:
        """Blocks until the checkpoint is durable. See ``CheckpointFuture.result``."""
        return self.committed.result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Blocks until the save is settled, and returns its error or None."""
        return self.committed.exception(timeout)

    def done(self) -> bool:
        """Whether the save is settled."""
        return self.committed.done()

    def cancel(self) -> bool:
        """Gives the save up, if it can still be: ``committed`` then raises ``Cancelled``. A save that was past that
        commits.

        False if it is settled already.
        """
        return self.committed.cancel()

    def add_done_callback(self, fn: Callable[[CheckpointFuture[SaveResult]], object]) -> None:
        """Calls ``fn`` with the ``committed`` future once it is done. See ``CheckpointFuture.add_done_callback``."""
        self.committed.add_done_callback(fn)

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for one of the futures just now."""
        return self.staged.awaited or self.committed.awaited

    def take_unseen_failure(self) -> BaseException | None:
        """The save's error if nobody has looked at either future, which counts as looking; None for one skipped or
        cancelled.
        """
        seen = self.staged.failed and self.staged.unseen_failure is None
        error = None if seen else self.committed.unseen_failure
        self.committed.mark_seen()
        return None if isinstance(error, (SaveSkipped, Cancelled)) else error


class PendingSaves:
    """Keeps every save until it is settled and, if it failed, seen. From any thread."""

    def __init__(self, on_error: OnError) -> None:
        self._on_error = on_error
        self._lock = threading.RLock()
        self._handles: list[SaveHandle] = []
        self._entering = 0

    @contextmanager
    def entering(self) -> Iterator[bool]:
        """Around a call of ``save``: whether another save was called before and is not settled."""
        with self._lock:
            busy = self._entering > 0 or any(not handle.done() for handle in self._handles)
            self._entering += 1
        try:
            yield busy
        finally:
            with self._lock:
                self._entering -= 1

    def add(self, handle: SaveHandle) -> None:
        """Another save is under way."""
        with self._lock:
            self._handles.append(handle)

    def unsettled(self) -> list[SaveHandle]:
        """The saves that are under way, in the order of their calls."""
        with self._lock:
            return [handle for handle in self._handles if not handle.done()]

    def all_staged(self, engine: Engine) -> CheckpointFuture[None]:
        """Resolves once all saves that are under way have copied their tensors, or have failed."""
        name, waiting = "staging of all pending saves", [handle.staged for handle in self.unsettled()]
        if waiting:
            return engine.submit(_settled, waiting, name=name)
        future: CheckpointFuture[None] = engine.future(name)
        future.resolve(None)
        return future

    def hold(self, deadline: float) -> None:
        """Blocks until a step of the calling thread changes nothing that a save reads. One that still has to be copied
        after ``deadline`` seconds is dropped: the training is worth more.
        """
        until = time.monotonic() + deadline
        for handle in self.unsettled():
            if not handle.hold(max(until - time.monotonic(), 0)):
                _logger.error("the save to %s is dropped: its staging held a step up for %g s", handle.path, deadline)
                handle.cancel()
                handle.hold(_STOP_SECONDS)

    def give_up(self, deadline: float, settle_seconds: float) -> list[str]:
        """Waits ``deadline`` seconds for all saves to settle, then gives up those that have not, and waits for that.
        Returns the paths of these, but for those that were committed after all.
        """
        with self._lock:
            handles = [handle for handle in self._handles if not handle.done()]
        until = time.monotonic() + deadline
        late = [handle for handle in handles if not handle.committed.wait(max(until - time.monotonic(), 0))]
        for handle in reversed(late):  # else one might come to its turn, and commit, as the one before it is given up
            handle.cancel()
        until = time.monotonic() + settle_seconds + 1
        for handle in late:
            handle.committed.wait(max(until - time.monotonic(), 0))
        return [handle.path for handle in late if not handle.committed.done() or handle.committed.failed]

    def late(self, given_up: list[str], deadline: float, stuck: DeadlineExceeded | None) -> DeadlineExceeded:
        """The error for what a close gave up and left behind; other failures that nobody saw are its notes."""
        parts = []
        if given_up:
            within = f"{deadline:g} s (option close_deadline)"
            parts.append(f"saves that were not durable within {within}: {', '.join(given_up)}")
        if stuck is not None:
            parts.append(f"threads that never returned: {stuck}")
        error = DeadlineExceeded(f"close gave up {'; and '.join(parts)}")
        for path, failure in self.take_unseen(awaited=True):
            if path not in given_up:
                error.add_note(f"an earlier save to {path} failed and nobody looked at it: {failure}")
        return error

    def take_unseen(self, *, awaited: bool = False) -> list[tuple[str, BaseException]]:
        """Path and error of each failure that nobody has looked at, which counts as looking. One that somebody is just
        waiting for is passed over; with ``awaited`` it is theirs for good.
        """
        with self._lock:
            taken = [handle for handle in self._handles if handle.done() and (awaited or not handle.awaited)]
            for handle in taken:  # not a new list, which would lose what a signal's handler adds meanwhile
                if handle in self._handles:
                    self._handles.remove(handle)
        return [
            (handle.path, error)
            for handle in taken
            if not handle.awaited and (error := handle.take_unseen_failure()) is not None
        ]

    def surface(self, *, awaited: bool = False) -> None:
        """Raises, warns of, or hands on what failed unseen, as ``on_error`` says. Of several that are to be raised the
        last is, and its notes name the others.
        """
        failures = self.take_unseen(awaited=awaited)
        if callable(self._on_error):
            for _, error in failures:
                self._on_error(error)
            return
        messages = [f"an earlier save to {path} failed and nobody looked at it: {error}" for path, error in failures]
        if self._on_error == "warn":
            for message in messages:
                warn_caller(message, RuntimeWarning)
        elif failures:
            path, error = failures[-1]
            raised = UnseenFailure(messages[-1], path=path)
            for message in messages[:-1]:
                raised.add_note(message)
            raise raised from error

    def log_unseen(self) -> None:
        """For an owner that goes away: what failed unseen is logged, and of saves under way once they have failed.
        These stay here, for its guards, which the optimizers keep.
        """
        with self._lock:
            handles, self._handles = self._handles, [handle for handle in self._handles if not handle.done()]
        for handle in handles:
            handle.add_done_callback(partial(_log_unseen, handle))


async def _settled(futures: Sequence[CheckpointFuture[None]]) -> None:
    for future in futures:
        await future.settled()


def _log_unseen(handle: SaveHandle, _: object) -> None:
    if not handle.awaited and (error := handle.take_unseen_failure()) is not None:
        _logger.error("a save to %s failed and nobody looked at it", handle.path, exc_info=error)


class Guards:
    """From any thread. A step waits ``deadline`` seconds for the saves that are under way."""

    def __init__(self, pending: PendingSaves, engine: Engine, deadline: float) -> None:
        self._pending = pending
        self._engine = engine
        self._deadline = deadline
        self._lock = threading.RLock()
        self._guards: list[Guard] = []

    def add(self, optimizers: tuple[torch.optim.Optimizer, ...]) -> Guard:
        """Guards these optimizers, until the guard is removed."""
        guard = Guard(optimizers, self._hold)
        with self._lock:
            self._guards = [*(old for old in self._guards if old.active), guard]
        return guard

    def active(self) -> list[Guard]:
        """Those that were not removed."""
        with self._lock:
            return [guard for guard in self._guards if guard.active]

    def _hold(self) -> None:
        if not self._engine.inherited:  # a forked child steps its own copy of the tensors, and no save is its own
            self._pending.hold(self._deadline)
