"""One save on the engine's loop: its turns, staging beside the pipeline, and its end, whatever that is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import anyio

from asyncdcp.checkpointer.handles import SaveHandle
from asyncdcp.checkpointer.lanes import Lanes, Turn
from asyncdcp.config import Options
from asyncdcp.engine import Engine
from asyncdcp.errors import (
    AsyncDCPError,
    Cancelled,
    CommitUnknown,
    DeadlineExceeded,
    StructureChanged,
    foreign_error,
)
from asyncdcp.extensions import PLAIN, Chain
from asyncdcp.pipeline.messages import Saved, SaveJob
from asyncdcp.pipeline.session import SaveSession, SessionRequest
from asyncdcp.planning import SavePlan
from asyncdcp.results import SaveResult, frozen
from asyncdcp.staging import CheckpointStager, Sources, StagingArena
from asyncdcp.storage import Storage
from asyncdcp.trace import Trace
from asyncdcp.unwinding import cancelled_by_others, drop_frames, frameless, ungrouped

_AGREEMENTS = 3
"""How many agreements there may be before a save, each with its deadline."""


@dataclass(frozen=True)
class Planned:
    """What a save's plan is, and what the pipeline is told of it. ``picks`` are what this rank writes of its sources,
    as ``Sources.select`` takes it; None for all.
    """

    plan: SavePlan
    job: SaveJob
    picks: Sequence[tuple[int, int, int]] | None = None


@dataclass
class SaveRequest:
    """A save as the caller's thread hands it over. ``sources`` are dropped as soon as they are staged.

    ``plan`` is called once the save's turn has come, and may have to agree with other ranks. ``tell_peers`` says to
    these that the save is given up before a pipeline knows of it; ``renew`` has them agree anew after one that was
    aborted for a hole.
    """

    storage: Storage
    plan: Callable[[], Awaitable[Planned]]
    tell_peers: Callable[[AsyncDCPError], Awaitable[None]]
    renew: Callable[[], object]
    sources: Sources
    trace: Trace
    begun: float
    chain: Chain = PLAIN


@dataclass
class _Attempt:
    """A save's staging into one arena, and the session that writes from it."""

    arena: StagingArena
    stager: CheckpointStager
    session: SaveSession
    staged: bool = False
    writing: bool = False
    released: bool = False


class SaveTask:
    """Carries one save out on the engine's loop. ``handle``'s futures are resolved here and nowhere else."""

    def __init__(self, request: SaveRequest, engine: Engine, lanes: Lanes, options: Options) -> None:
        path = request.storage.info.location
        self._request = request
        self._lanes = lanes
        self._arenas = lanes.arenas
        self._options = options
        self._staging = Turn()
        self._writing = Turn()
        self._attempt: _Attempt | None = None
        self._planned: Planned | None = None
        self._planning: anyio.CancelScope | None = None
        self._reached_pipeline = False
        self._error: AsyncDCPError | None = None
        self._copying: anyio.CancelScope | None = None
        self._staged_seconds = 0.0
        self._timers: list[asyncio.TimerHandle] = []
        self._over = False
        self.handle = SaveHandle(
            path,
            engine.future(f"staging of the save to {path}", cancel=self.cancel),
            engine.future(f"save to {path}", cancel=self.cancel),
            request.sources.hold,
        )

    async def run(self) -> None:
        """From the wait for its turn until it is settled. Never raises but for cancellation, at the engine's end."""
        self._lanes.staging.join(self._staging)
        self._lanes.writing.join(self._writing)
        outcome = await self._carried_out()
        if isinstance(outcome, AsyncDCPError) and not self._over:  # else others have it, and may be in its frames
            drop_frames(outcome)
        self._settle(outcome)

    async def _carried_out(self) -> SaveResult | AsyncDCPError:
        """What the save comes to."""
        try:
            with cancelled_by_others():
                return self._result(await self._save())
        except AsyncDCPError as error:
            if not self._reached_pipeline:
                await self._request.tell_peers(error)
            elif isinstance(error, StructureChanged):
                self._request.renew()
            return error
        except BaseException as error:
            self._settle(_unexpected(error, self._request.storage.info.location))
            raise

    def cancel(self) -> None:
        """Gives the save up, wherever it is."""
        if self._over:
            return
        self._give_up(Cancelled(f"the save to {self.handle.path} was cancelled", path=self.handle.path), "cancelled")
        self._limit(self._options.settle_seconds)

    async def _save(self) -> Saved:
        await self._staging.wait()
        self._check()
        self._planned = planned = await self._plan()
        if planned.picks is not None:
            self._request.sources.select(planned.picks)
        saved: Saved | None = None
        while saved is None:
            self._attempt = attempt = self._begin(planned)
            try:
                saved = await self._stage_and_write(attempt)
            finally:
                self._release(attempt)
        return saved

    def _check(self) -> None:
        """Goes no further with a save that was given up."""
        if self._error is not None:
            raise self._error

    async def _plan(self) -> Planned:
        seconds = _AGREEMENTS * self._options.agreement_deadline + self._options.settle_seconds
        timer = asyncio.get_running_loop().call_later(seconds, self._abandon)
        planned: Planned | None = None
        try:
            with anyio.CancelScope() as self._planning:
                planned = await self._request.plan()
        finally:
            timer.cancel()
            self._request.plan = _never  # it holds the state's tensors
        self._check()  # what cannot be cut short, a thread's work, ends well all the same
        assert planned is not None
        return planned

    def _begin(self, planned: Planned) -> _Attempt:
        request = self._request
        arena = self._arenas.acquire(len(planned.plan.slabs))
        stager = CheckpointStager(planned.plan, arena, request.trace)
        free = partial(_free, arena, stager)
        session = SessionRequest(planned.job, request.storage, arena.arena, free, request.trace, request.chain)
        return _Attempt(arena, stager, self._lanes.pipeline.open(session))

    async def _stage_and_write(self, attempt: _Attempt) -> Saved | None:
        """Both at once. If the pipeline ends first, staging is stopped; if staging fails, the pipeline is told to give
        up.

        None if an earlier save took the arena down with it while this one still needed slots of it: it has to be staged
        anew, in another.
        """
        saved: Saved | None = None
        with ungrouped():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(frameless, partial(self._stage, attempt))
                try:
                    await self._writing.wait()
                    if not attempt.session.begun:
                        self._check()
                    if attempt.staged or attempt.session.begun or not attempt.arena.abandoned:
                        self._limit(self._options.save_deadline + self._options.settle_seconds)
                        attempt.writing = self._reached_pipeline = True
                        saved = await attempt.session.run()
                finally:
                    tasks.cancel_scope.cancel()
        return saved

    async def _stage(self, attempt: _Attempt) -> None:
        request = self._request
        try:
            with anyio.CancelScope() as self._copying, ungrouped():
                await frameless(partial(attempt.stager.stage, request.sources, attempt.session.announce))
        except Exception as error:  # noqa: BLE001  # whatever it is, the save is settled and the caller told
            self._give_up(_unexpected(error, request.storage.info.location), "failed")
            return
        finally:
            if self._error is not None:
                request.sources.drop()
        if self._error is not None:
            return
        await attempt.session.staging_done()
        attempt.staged = True
        request.sources.drop()
        self._staged_seconds = time.monotonic() - request.begun
        self._staging.end()
        self.handle.staged.resolve(None)

    def _give_up(self, error: AsyncDCPError, kind: str) -> None:
        """A save that waits for its turn ends at once and leaves no trace; one under way is told to end."""
        self._error = self._error or error
        if self._planning is not None and self._planned is None:
            self._planning.cancel()
        if self._copying is not None:
            self._copying.cancel()  # at once, whatever the pipeline has still to settle: a guarded step may wait for it
        else:
            self._request.sources.drop()
        if self._attempt is not None:
            self._attempt.session.give_up(kind, error)
        self._staging.leave()
        self._writing.leave()

    def _release(self, attempt: _Attempt) -> None:
        """Nothing touches the arena for this save any more: neither a copy nor a write is under way."""
        if attempt.released:
            return
        attempt.released = True
        if attempt.session.quiet:
            for slot in attempt.stager.held:
                attempt.arena.ring.release(slot)
            attempt.stager.held.clear()
        else:  # the memory is another process's now; this one's mapping of it goes with its last user here
            self._arenas.abandon(attempt.arena)
        self._arenas.release(attempt.arena)
        self._lanes.pipeline.tidy()

    def _limit(self, seconds: float) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(seconds, self._abandon))

    def _abandon(self) -> None:
        """The save should have been settled by now: something in it never returns. Leave it, with the memory it may
        still read.
        """
        if self._over:
            return
        attempt, path = self._attempt, self.handle.path
        if self._planned is None and self._planning is not None and self._error is None:
            message = f"the save to {path} was not begun: the ranks did not agree, or the storage does not answer"
            self._give_up(DeadlineExceeded(message, path=path), "deadline")
        if attempt is not None and attempt.staged and not attempt.stager.held:
            self._release(attempt)  # stuck later than with its slabs
        elif attempt is not None:
            self._arenas.abandon(attempt.arena)
        if self._error is not None and (attempt is None or not attempt.writing):
            self._settle(self._error)  # it never came to writing, and never will
            return
        self._settle(
            CommitUnknown(
                f"the save to {path} did not end within its deadline and settle_seconds="
                f"{self._options.settle_seconds:g}: the storage does not answer. It may still be committed; load "
                "from the path once the storage answers",
                path=path,
            )
        )

    def _settle(self, outcome: SaveResult | AsyncDCPError) -> None:
        if self._over:
            return
        self._over = True
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self._request.sources.drop()
        self._staging.end()
        self._writing.end()
        if isinstance(outcome, AsyncDCPError):
            self.handle.staged.fail(outcome)
            self.handle.committed.fail(outcome)
        else:
            self.handle.committed.resolve(outcome)

    def _result(self, saved: Saved) -> SaveResult:
        request = self._request
        assert self._planned is not None
        job = self._planned.job
        return SaveResult(
            path=self.handle.path,
            save_id=saved.save_id,
            tensors=job.tensors,
            tensor_bytes=job.tensor_bytes,
            stored_bytes=saved.stored_bytes,
            staged_seconds=self._staged_seconds,
            durable_seconds=time.monotonic() - request.begun,
            stage_seconds=frozen({**request.trace.seconds(), **saved.seconds}),
            filesystem=saved.filesystem,
            replaced=tuple(saved.replaced),
            spans=tuple(request.trace.spans),
        )


async def _never() -> Planned:
    raise AssertionError("a save is planned once")


def _free(arena: StagingArena, stager: CheckpointStager, slot: int) -> None:
    """The pipeline has given a slot back."""
    stager.held.remove(slot)
    arena.ring.release(slot)


def _unexpected(error: BaseException, location: str) -> AsyncDCPError:
    """The error itself, or one of ours that carries it as its cause."""
    if isinstance(error, AsyncDCPError):
        return error
    if isinstance(error, asyncio.CancelledError):
        return Cancelled("the save was given up when its checkpointer closed")
    return foreign_error(f"the save to {location}", error, path=location)
