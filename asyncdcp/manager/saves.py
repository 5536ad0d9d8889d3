"""The saves of a manager from their call to the last that follows from them, and the failures that nobody has seen."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import SupportsFloat

import anyio
import torch

from asyncdcp.checkpointer import SaveHandle
from asyncdcp.checkpointer.jobs import plain_json
from asyncdcp.config import OnError
from asyncdcp.engine import Engine
from asyncdcp.errors import AsyncDCPError, DeadlineExceeded, Fenced, InvalidOption, SaveSkipped, UnseenFailure, in_words
from asyncdcp.futures import CheckpointFuture
from asyncdcp.manager.session import Finished, RunSession
from asyncdcp.manager.telemetry import Reporter
from asyncdcp.results import SaveResult
from asyncdcp.warn import warn_caller

_logger = logging.getLogger("asyncdcp.manager")


@dataclass
class Called:
    """A save as it was called: its step, its metrics, when, and how long the call took."""

    step: int
    metrics: dict[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0


def as_numbers(metrics: Mapping[str, SupportsFloat] | None) -> dict[str, float | None]:
    """The metrics as they will be read back; ``InvalidOption`` for what is no number, or what a Record cannot carry."""
    found: dict[str, float | None] = {}
    if metrics is not None and not isinstance(metrics, Mapping):
        raise InvalidOption(f"metrics takes numbers by name, such as {{'loss': 0.5}}, not {metrics!r:.80}")
    for name, value in (metrics or {}).items():
        try:
            number = float(value.detach() if isinstance(value, torch.Tensor) else value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise InvalidOption(f"metrics[{name!r}] is {value!r:.80}; metrics take numbers: {error}") from error
        if not isinstance(name, str):
            raise InvalidOption(f"metrics take names, not {name!r}")
        found[name] = number if math.isfinite(number) else None
    return plain_json("metrics", found)


class _Save:
    """``over`` resolves, to None, once the save is settled and all that follows from it is done."""

    def __init__(self, called: Called, handle: SaveHandle, over: CheckpointFuture[None]) -> None:
        self.called = called
        self.handle = handle
        self.over = over


class Saves:
    """Follows every save to its end. From any thread. ``leads`` is whether this is the rank that writes to the run.

    ``fenced`` is set for good once the run was seen to be another's.
    """

    def __init__(self, session: RunSession, engine: Engine, reporter: Reporter, *, leads: bool) -> None:
        self.fenced: Fenced | None = None
        self._session = session
        self._engine = engine
        self._reporter = reporter
        self._leads = leads
        self._lock = threading.RLock()
        self._saves: list[_Save] = []
        self._mirrored: list[CheckpointFuture[None]] = []
        self._failures: list[BaseException] = []

    def add(self, called: Called, handle: SaveHandle) -> None:
        """Another save is under way."""
        self._reporter.emit("save", f"step {called.step} is being saved", called.step)
        self.failures(take=False)  # lets go of saves that are over
        with self._lock:
            name = f"what follows from step {called.step} (history, retention)"
            over = self._engine.submit(self._follow, called, handle, copy_context(), name=name)
            self._saves.append(_Save(called, handle, over))

    def limit(self, handle: SaveHandle, until: float) -> None:
        """Gives the save up if it is not durable by then, on the clock of ``time.monotonic``."""
        self._engine.submit(self._cut_off, handle, until)

    def newest(self) -> int:
        """The newest step that was saved, or is being saved, on the run's line; -1 for none."""
        with self._lock:
            left = [save for save in self._saves if not save.over.done()]  # what is over is in the session's standing
        called = [save.called.step for save in left if not save.handle.committed.failed]
        return max([self._session.standing.step, *called])

    def parent(self) -> str | None:
        """The save id of the newest checkpoint on the line that is committed already."""
        with self._lock:
            left = [save for save in self._saves if not save.over.done()]
        done = [save for save in left if save.handle.done() and not save.handle.committed.failed]
        newest = max(done, key=lambda save: save.called.step, default=None)
        if newest is None or newest.called.step <= self._session.standing.step:
            return self._session.standing.head
        return newest.handle.result().save_id

    async def settle(self) -> None:
        """Returns when all saves that were called before are settled, with all that follows from them."""
        with self._lock:
            saves = list(self._saves)
        for save in saves:
            await save.over

    def check_over(self, deadline: float) -> None:
        """``DeadlineExceeded`` if closing, which is done, has cut off what follows from saves. They are durable."""
        with self._lock:
            futures = [*(save.over for save in self._saves), *self._mirrored]
        cut = ", ".join(future.name for future in futures if future.cancelled())
        if cut:
            raise DeadlineExceeded(
                f"close gave up what was not done within {deadline:g} s (option close_deadline): {cut}"
            )

    # ── failures ──

    def collect(self, error: BaseException) -> None:
        """Something has failed, and nobody has seen it yet."""
        with self._lock:
            self._failures.append(error)

    def failures(self, *, take: bool = True) -> list[BaseException]:
        """What failed unseen. Taken, it counts as seen. What somebody waits for just now is theirs."""
        with self._lock:
            for save in self._saves:
                if save.handle.done() and not save.handle.awaited:
                    error = save.handle.take_unseen_failure()
                    if error is not None:
                        self._failures.append(error)
            self._saves = [save for save in self._saves if not self._is_gone(save)]
            found = list(self._failures)
            if take:
                self._failures.clear()
        return found

    def failure_text(self) -> str | None:
        """For the other ranks: the first of them in words."""
        found = self.failures(take=False)
        if self.fenced is not None:
            found.insert(0, self.fenced)
        return in_words(found[0]) if found else None

    def _is_gone(self, save: _Save) -> bool:
        return save.over.done() and not save.handle.awaited

    # ── from a save's call on ──

    async def _follow(self, called: Called, handle: SaveHandle, context: Context) -> None:
        """To the last that follows from it, whoever's done callbacks take their time. Listeners and the tracer are
        called in the context of the save's call.
        """
        await handle.committed.settled()
        step, failure = called.step, handle.committed.failure
        if isinstance(failure, SaveSkipped):
            context.run(partial(self._reporter.emit, "skipped", str(failure), step))
            return
        if failure is not None:
            what = f"the save of step {step} failed: {failure}"
            context.run(partial(self._reporter.emit, "failed", what, step, cause=str(failure)))
            return
        result = handle.committed.result()
        self._session.committed(step, result.save_id)
        context.run(self._tell_committed, called, result)
        if self._leads:
            await self._finish(Finished(step, result, called.metrics, called.seconds))

    def _tell_committed(self, called: Called, result: SaveResult) -> None:
        self._reporter.emit(
            "committed",
            f"step {called.step} is durable",
            called.step,
            tensor_bytes=result.tensor_bytes,
            stored_bytes=result.stored_bytes,
            staged_seconds=result.staged_seconds,
            durable_seconds=result.durable_seconds,
            metrics=called.metrics,
        )
        # Not here: a tracer may take its time, and all of the manager waits for this loop.
        self._engine.schedule(copy_context(), partial(self._reporter.trace_save, called.step, result))

    async def _finish(self, finished: Finished) -> None:
        try:
            await self._session.finish(finished)
        except Fenced as error:
            self.fenced = error
        except Exception as error:  # noqa: BLE001  # it surfaces at the next verb
            self.collect(error)
        if self.fenced is None and self._session.mirror is not None:
            # Apart from what follows: who waits for it says so. The last one copies what those before it have not.
            self._mirrored = [self._engine.submit(self.copy, name="the copying to the mirror")]

    async def copy(self) -> None:
        """Brings the mirror up to date; a failure surfaces at the next verb, and the next save tries again."""
        try:
            await self._session.follow()
        except Exception as error:  # noqa: BLE001  # whatever it is
            self.collect(error)

    async def _cut_off(self, handle: SaveHandle, until: float) -> None:
        with anyio.move_on_after(max(until - time.monotonic(), 0.0)):
            await handle.committed.settled()
        if handle.cancel():
            _logger.error("the last save, to %s, was not durable in time before the process ends", handle.path)


def surface(failures: list[BaseException], on_error: OnError) -> None:
    """Raises, warns of, or hands on what failed unseen. Of several that are to be raised the last is, with notes."""
    if callable(on_error):
        for failure in failures:
            on_error(failure)
        return
    texts = [str(each) if isinstance(each, AsyncDCPError) else in_words(each) for each in failures]
    messages = [f"something failed that nobody looked at: {text}" for text in texts]
    if on_error == "warn":
        for message in messages:
            warn_caller(message, RuntimeWarning)
    elif failures:
        raised = UnseenFailure(messages[-1])
        for message in messages[:-1]:
            raised.add_note(message)
        raise raised from failures[-1]
