"""SaveHandle: what ``save`` returns at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

from asyncdcp.errors import Cancelled, SaveSkipped
from asyncdcp.futures import CheckpointFuture
from asyncdcp.results import SaveResult


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
