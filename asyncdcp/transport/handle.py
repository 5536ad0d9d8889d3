"""SendHandle: what ``send_checkpoint`` returns at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

from asyncdcp.futures import CheckpointFuture
from asyncdcp.transport.reports import SendReport


class SendHandle:
    """A send under way, as its two futures, as a ``SaveHandle``.

    ``staged`` resolves (to None) when the state may be changed again; ``sent`` to a ``SendReport`` when every receiver
    has verified what it got. Awaiting the handle, or ``result()``, is that of ``sent``. A handle unpacks into its two
    futures.
    """

    def __init__(
        self, staged: CheckpointFuture[None], sent: CheckpointFuture[SendReport], hold: Callable[[float], bool]
    ) -> None:
        self.staged = staged
        self.sent = sent
        self._hold = hold

    def hold(self, timeout: float) -> bool:
        """Blocks until the calling thread may change tensors; whether that came. See ``Sources.hold``."""
        return self._hold(min(timeout, threading.TIMEOUT_MAX))

    def __iter__(self) -> Iterator[CheckpointFuture[Any]]:
        return iter((self.staged, self.sent))

    def __await__(self) -> Generator[Any, Any, SendReport]:
        return self.sent.__await__()

    def __repr__(self) -> str:
        stage = "staging" if not self.staged.done() else "sending" if not self.sent.done() else "settled"
        return f"<SendHandle {self.sent.name!r} {stage}>"

    def result(self, timeout: float | None = None) -> SendReport:
        """Blocks until every receiver has the state. See ``CheckpointFuture.result``."""
        return self.sent.result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Blocks until the send is settled, and returns its error or None."""
        return self.sent.exception(timeout)

    def done(self) -> bool:
        """Whether the send is settled."""
        return self.sent.done()

    def cancel(self) -> bool:
        """Gives the send up; the receivers fail too, and the group can be used again. False if it is settled."""
        return self.sent.cancel()
