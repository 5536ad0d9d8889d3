"""One save on the engine's loop: its turns, staging beside the pipeline, and its end, whatever that is."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import anyio
from anyio import to_thread
from torch import Tensor

from asyncdcp.checkpointer.handle import SaveHandle
from asyncdcp.checkpointer.turns import Turn, TurnQueue
from asyncdcp.config import Options
from asyncdcp.engine import Engine
from asyncdcp.errors import AsyncDCPError, Cancelled, CommitUnknown, ungrouped
from asyncdcp.pipeline.messages import Saved, SaveJob
from asyncdcp.pipeline.session import LocalSession, SaveSession
from asyncdcp.planning import SavePlan
from asyncdcp.results import SaveResult, frozen
from asyncdcp.staging import Arenas, CheckpointStager, SlabCopier, StagingArena
from asyncdcp.storage import Storage
from asyncdcp.trace import Trace


@dataclass
class SaveRequest:
    """A save as the caller's thread hands it over. ``sources`` are dropped as soon as they are staged."""

    job: SaveJob
    storage: Storage
    plan: SavePlan
    sources: list[Tensor]
    trace: Trace
    begun: float


class Lanes:
    """What the saves of a checkpointer share: the order in which they stage and write, and the arenas. Used on one loop
    only.
    """

    def __init__(self, arenas: Arenas) -> None:
        self.arenas = arenas
        self.staging = TurnQueue()
        self.writing = TurnQueue()


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
        self._arena: StagingArena | None = None
        self._stager: CheckpointStager | None = None
        self._session: SaveSession | None = None
        self._error: AsyncDCPError | None = None
        self._staged_seconds = 0.0
        self._over = False
        self.handle = SaveHandle(
            path,
            engine.future(f"staging of the save to {path}", cancel=self.cancel),
            engine.future(f"save to {path}", cancel=self.cancel),
        )

    async def run(self) -> None:
        """From the wait for its turn until it is settled. Never raises but for cancellation, at the engine's end."""
        self._lanes.staging.join(self._staging)
        self._lanes.writing.join(self._writing)
        try:
            saved = await self._save()
        except AsyncDCPError as error:
            self._settle(error)
        except BaseException as error:
            self._settle(_unexpected(error))
            raise
        else:
            self._settle(self._result(saved))

    def cancel(self) -> None:
        """Gives the save up, wherever it is."""
        self._give_up(Cancelled(f"the save to {self.handle.path} was cancelled", path=self.handle.path), "cancelled")
        self._staging.leave()
        self._writing.leave()
        self._limit(self._options.settle_seconds)

    async def _save(self) -> Saved:
        came = await self._staging.wait()
        if self._error is not None or not came:
            raise self._error or Cancelled("the save was given up before its turn")
        request = self._request
        self._arena = self._arenas.acquire(len(request.plan.slabs))
        self._stager = CheckpointStager(request.plan, self._arena, request.trace)
        self._session = LocalSession(request.job, request.storage, self._arena.arena, self._free, request.trace)
        try:
            return await self._stage_and_write(self._session, self._stager)
        finally:
            self._release()

    async def _stage_and_write(self, session: SaveSession, stager: CheckpointStager) -> Saved:
        """Both at once. If the pipeline ends first, staging is stopped; if staging fails, the pipeline is told to give
        up.
        """
        saved: Saved | None = None
        with ungrouped():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._stage, session, stager)
                await self._writing.wait()
                self._limit(self._options.save_deadline + self._options.settle_seconds)
                try:
                    saved = await session.run()
                finally:
                    tasks.cancel_scope.cancel()
        assert saved is not None
        return saved

    async def _stage(self, session: SaveSession, stager: CheckpointStager) -> None:
        request = self._request
        try:
            copier = await to_thread.run_sync(SlabCopier, request.plan, request.sources)
            with ungrouped():
                await stager.stage(copier, session.announce)
        except Exception as error:  # noqa: BLE001  # whatever it is, the save is settled and the caller told
            self._give_up(_unexpected(error), "failed")
            return
        session.staging_done()
        request.sources.clear()
        self._staged_seconds = time.monotonic() - request.begun
        self._staging.end()
        self.handle.staged.resolve(None)

    def _give_up(self, error: AsyncDCPError, kind: str) -> None:
        self._error = self._error or error
        if self._session is not None:
            self._session.give_up(kind, error)

    def _free(self, slot: int) -> None:
        """The pipeline has given a slot back."""
        assert self._arena is not None and self._stager is not None
        self._stager.held.remove(slot)
        self._arena.ring.release(slot)

    def _release(self) -> None:
        """Nothing touches the arena any more: neither a copy nor a write is under way."""
        arena, stager = self._arena, self._stager
        assert arena is not None and stager is not None
        for slot in stager.held:
            arena.ring.release(slot)
        stager.held.clear()
        self._arenas.release(arena)

    def _limit(self, seconds: float) -> None:
        asyncio.get_running_loop().call_later(seconds, self._abandon)

    def _abandon(self) -> None:
        """The save should have been settled by now: something in it never returns. Leave it, with the memory it may
        still read.
        """
        if self._over:
            return
        path = self.handle.path
        if self._arena is not None:
            self._arenas.abandon(self._arena)
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
        self._request.sources.clear()
        self._staging.end()
        self._writing.end()
        if isinstance(outcome, AsyncDCPError):
            self.handle.staged.fail(outcome)
            self.handle.committed.fail(outcome)
        else:
            self.handle.committed.resolve(outcome)

    def _result(self, saved: Saved) -> SaveResult:
        request = self._request
        return SaveResult(
            path=self.handle.path,
            save_id=saved.save_id,
            tensors=request.job.tensors,
            tensor_bytes=request.job.tensor_bytes,
            stored_bytes=saved.stored_bytes,
            staged_seconds=self._staged_seconds,
            durable_seconds=time.monotonic() - request.begun,
            stage_seconds=frozen(saved.seconds),
            filesystem=saved.filesystem,
            replaced=tuple(saved.replaced),
        )


def _unexpected(error: BaseException) -> AsyncDCPError:
    """The error itself, or one of ours that carries it as its cause."""
    if isinstance(error, AsyncDCPError):
        return error
    if isinstance(error, asyncio.CancelledError):
        return Cancelled("the save was given up when its checkpointer closed")
    known = AsyncDCPError(f"the save failed: {type(error).__name__}: {error}")
    known.__cause__ = error
    return known
