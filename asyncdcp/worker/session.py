"""RemoteSession: one save in the background process, as the trainer's side sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import anyio

from asyncdcp.errors import AsyncDCPError, DeadlineExceeded, WorkerCrashed
from asyncdcp.extensions import ExtensionSpec
from asyncdcp.pipeline.messages import Saved, SlabReady
from asyncdcp.pipeline.session import SessionRequest
from asyncdcp.pipeline.settle import Reason
from asyncdcp.storage.spec import StorageSpec
from asyncdcp.trace import Span
from asyncdcp.worker.failures import from_frame, to_frame
from asyncdcp.worker.fence import settle_without_worker
from asyncdcp.worker.process import CheckpointProcess
from asyncdcp.worker.protocol import (
    Begin,
    Done,
    ErrorFrame,
    Failed,
    Freed,
    SaveEvent,
    SaveState,
    Slab,
    Spans,
    Staged,
    Stop,
    save_machine,
)

PATIENCE = 0.5
"""The part of ``settle_seconds`` that a worker gets to answer once a save is given up. Then it is killed, and the
trainer settles the save itself in what is left."""
KILL_PATIENCE = 0.2
"""The part in which a killed worker's death is waited for."""


class RemoteSession:
    """A ``SaveSession`` over the socket.

    The save is handed to the worker as staging begins, so that a save that is staged is the worker's even while an
    earlier one is still written. ``run`` returns or raises by the worker's answer, or else by its confirmed death and
    the Record, or else by the Record alone; ``quiet`` is false then, and the arena must never be used again.
    """

    def __init__(
        self,
        acquire: Callable[[], Awaitable[CheckpointProcess]],
        request: SessionRequest,
        spec: StorageSpec,
        extensions: list[ExtensionSpec],
        settle_seconds: float,
    ) -> None:
        self._acquire = acquire
        self._request = request
        self._spec = spec
        self._extensions = extensions
        self._settle_seconds = settle_seconds
        self._id = request.job.save_id
        self._process: CheckpointProcess | None = None
        self._opening = anyio.Lock()
        self._start_error: AsyncDCPError | None = None
        self._reason: Reason | None = None
        self._until: float | None = None
        self._answer: Done | Failed | None = None
        self._machine = save_machine()
        self._changed = anyio.Event()
        self.quiet = True

    @property
    def begun(self) -> bool:
        """Whether a worker knows of the save."""
        return self._process is not None

    # ── the trainer's side speaks ──

    async def announce(self, slab: SlabReady) -> None:
        process = await self._opened()
        if process is not None and self._is_live():
            self._machine.on(SaveEvent.SLAB)
            process.post(Slab(self._id, slab))

    async def staging_done(self) -> None:
        process = await self._opened()
        if process is not None and self._is_live():
            self._machine.on(SaveEvent.STAGED)
            process.post(Staged(self._id))
            await process.flushed()

    def give_up(self, kind: str, error: AsyncDCPError) -> None:
        if self._reason is None:
            self._reason = Reason(kind, error)
            if self._process is not None and self._is_live():
                self._machine.on(SaveEvent.STOP)
                self._process.post(Stop(self._id, kind, to_frame(error, with_traceback=False)))
            self._limit(PATIENCE * self._settle_seconds)

    def _is_live(self) -> bool:
        return self._machine.state in (SaveState.STAGING, SaveState.STAGED, SaveState.STOPPING)

    async def _opened(self) -> CheckpointProcess | None:
        """The worker, told of the save; None if there is none, or no need to tell."""
        async with self._opening:
            if self._process is None and self._start_error is None and self._reason is None:
                try:
                    process = await self._acquire()
                except AsyncDCPError as error:
                    self._start_error = error
                else:
                    self._begin(process)
        return self._process

    def _begin(self, process: CheckpointProcess) -> None:
        if self._reason is not None:  # given up while the worker started
            return
        process.begin(Begin(0, self._spec, self._request.job, self._extensions), self._request.arena, self)
        self._process = process
        self._machine.on(SaveEvent.BEGIN)

    # ── the worker's side is heard ──

    def on_message(self, message: Freed | Spans | Done | Failed) -> None:
        """As ``SaveListener``."""
        match message:
            case Freed(_, slot):
                self._machine.on(SaveEvent.NEWS)
                self._request.on_free(slot)
            case Spans(_, spans):
                self._machine.on(SaveEvent.NEWS)
                for span in spans:
                    self._request.trace.add(Span(*span))
            case Done() | Failed():
                self._machine.on(SaveEvent.ANSWER)
                self._answer = message
                self._tell()

    def on_death(self) -> None:
        """As ``SaveListener``."""
        self._machine.on(SaveEvent.DIED)
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    # ── the end ──

    async def run(self) -> Saved:
        self._limit(self._request.job.deadline + PATIENCE * self._settle_seconds)
        process = await self._opened()
        if process is None:
            raise self._failure()
        if process.condemned:  # over an earlier save; this one need not wait its whole deadline for an answer
            self._reason = self._reason or Reason("failed", self._failure())
            self._limit(0)
        try:
            await self._wait_for_end()
            if self._is_live():
                await self._end_silence(process)
            return await self._outcome()
        finally:
            process.forget(self._id)

    async def _wait_for_end(self) -> None:
        """Until the worker has answered or died, or should have."""
        while self._is_live():
            left = (self._until or 0.0) - asyncio.get_running_loop().time()
            if left <= 0:
                return
            with anyio.move_on_after(left):
                await self._changed.wait()

    def _limit(self, seconds: float) -> None:
        until = asyncio.get_running_loop().time() + seconds
        self._until = until if self._until is None else min(until, self._until)
        self._tell()

    async def _end_silence(self, process: CheckpointProcess) -> None:
        """Kills a worker that does not answer; one that does not even die is fenced off."""
        if self._reason is None:
            seconds, location = self._request.job.deadline, self._request.storage.info.location
            late = f"the save to {location} was not durable within {seconds:g} s (option save_deadline)"
            self._reason = Reason("deadline", DeadlineExceeded(late, path=location))
        process.kill()
        if not await process.wait_dead(KILL_PATIENCE * self._settle_seconds) and self._is_live():
            self._machine.on(SaveEvent.SILENT)
            process.forget(self._id)  # whatever it says from here on, the Record decides
            self.quiet = False

    async def _outcome(self) -> Saved:
        match self._answer:
            case Done(_, saved):
                return saved
            case Failed(_, frame):
                raise self._error_of(frame)
        reason = self._reason or Reason("failed", self._failure())
        dead = self._machine.state is SaveState.ORPHANED
        request = self._request
        return await settle_without_worker(request.job, request.storage, reason, request.chain, dead=dead)

    def _error_of(self, frame: ErrorFrame) -> AsyncDCPError:
        """The worker's error; the trainer's own object, if it is what the worker was told."""
        error = from_frame(frame)
        if self._reason is not None and type(error) is type(self._reason.error):
            return self._reason.error
        return error

    def _failure(self) -> AsyncDCPError:
        """Why there is no worker."""
        if self._reason is not None:
            return self._reason.error
        location = self._request.storage.info.location
        if self._start_error is not None:
            message = f"the save to {location} failed: {self._start_error}"
            error = WorkerCrashed(message, path=location, save=self._id)
            error.__cause__ = self._start_error
            return error
        number = self._process.signal if self._process is not None else None
        how = "ended" if number is None else f"was ended by signal {number}"
        if self._process is not None and self._process.condemned:
            how = "was killed over an earlier save, and has not ended yet,"
        message = f"the background process {how} before the save {self._id} to {location} was committed"
        return WorkerCrashed(message, path=location, signal=number, save=self._id)
