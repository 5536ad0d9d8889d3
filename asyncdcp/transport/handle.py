"""SendHandle, which ``send_checkpoint`` returns at once; what a transfer comes to in the end; and which verbs of a
transport somebody may still have to hear of. Times in seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, TypeVarTuple

from asyncdcp.errors import Cancelled, UnseenFailure
from asyncdcp.futures import CheckpointFuture

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@dataclass(frozen=True)
class SendReport:
    """A state that all of ``ranks`` have received and verified."""

    ranks: tuple[int, ...]
    tensors: int
    bytes: int
    """Of the state's tensors; each rank got as many."""
    staged_seconds: float
    """Until the tensors could be changed again."""
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """To each rank."""
        return self.bytes / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class ReceiveReport:
    """A state that was received from ``rank``; at the ``report`` of the future."""

    rank: int
    tensors: int
    bytes: int
    in_place_bytes: int
    """As many of them were received straight into tensors' memory."""
    shared: bool
    """Whether they came by memory shared with the sender, a process of the same host, and not over the group."""
    seconds: float
    """From the offer on: the wait for a sender to come is not counted."""
    stage_seconds: Mapping[str, float]

    @property
    def bytes_per_second(self) -> float:
        """Received, verified and delivered."""
        return self.bytes / max(self.seconds, 1e-9)


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

    @property
    def name(self) -> str:
        """What it is, for messages."""
        return self.sent.name

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

    @property
    def unseen_failure(self) -> BaseException | None:
        """The error, as long as nobody got it from either future. For the owner, as that of a future."""
        seen = self.staged.failed and self.staged.unseen_failure is None
        return None if seen else self.sent.unseen_failure

    @property
    def awaited(self) -> bool:
        """As that of a future: whether somebody waits for either."""
        return self.sent.awaited or self.staged.awaited

    def cancel(self) -> bool:
        """Gives the send up; the receivers fail too, and the group can be used again. False if it is settled."""
        return self.sent.cancel()


Verb: TypeAlias = SendHandle | CheckpointFuture[Any]


class Outstanding:
    """Those under way, and those that failed and nobody looked; who cancels one knows of it. All others are let go of,
    since a receive holds the state. From any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._verbs: list[Verb] = []

    def add(self, verb: Verb) -> None:
        """One that has begun."""
        with self._lock:
            self._verbs.append(verb)
            self._sweep()

    async def during(self, work: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """Runs what carries out one of them."""
        try:
            return await work(*args)
        finally:
            with self._lock:
                self._sweep()

    def _sweep(self) -> None:
        for verb in list(self._verbs):  # not a new list, which would lose what a signal's handler adds meanwhile
            if verb.done() and not _unseen(verb) and verb in self._verbs:
                self._verbs.remove(verb)

    def unstaged(self) -> list[SendHandle]:
        """The sends whose tensors may still be read."""
        with self._lock:
            return [verb for verb in self._verbs if isinstance(verb, SendHandle) and not verb.staged.done()]

    def wait(self) -> None:
        """Blocks until all that began before are done: each ends by the timeout of whatever it waits for."""
        for verb in list(self._verbs):
            (verb.sent if isinstance(verb, SendHandle) else verb).wait()

    def surface(self) -> None:
        """Raises what failed unseen, and nobody awaits: of several the last, and its notes name the others."""
        # Whether it is awaited first: who awaits it has seen it before that ends.
        unseen = [(verb, error) for verb in self._verbs if not verb.awaited and (error := _unseen(verb))]
        if unseen:
            *others, message = [f"the {verb.name} failed and nobody looked at it: {error}" for verb, error in unseen]
            raised = UnseenFailure(message)
            for other in others:
                raised.add_note(other)
            raise raised from unseen[-1][1]


def _unseen(verb: Verb) -> BaseException | None:
    error = verb.unseen_failure
    return None if isinstance(error, Cancelled) else error
