"""RunSession: a manager's dealings with its run, on the manager's own loop. Rank 0 writes; the others hear of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
from anyio import CancelScope

from asyncdcp.errors import (
    AsyncDCPError,
    Fenced,
    PeerFailed,
    in_words,
)
from asyncdcp.extensions import PLAIN, ExtensionRegistry
from asyncdcp.manager.choosing import NOT_WHOLE, Choice, Choosing, one, say_fallback, say_fetched
from asyncdcp.manager.mirror import Mirror
from asyncdcp.manager.reading import LoadFrom, load_checkpoint
from asyncdcp.manager.restoring import chosen, load_first, said
from asyncdcp.manager.telemetry import Reporter
from asyncdcp.ranks import Ranks, gather, leave
from asyncdcp.results import SaveResult
from asyncdcp.runs import Checkpoint, Retention, Run, Saved, look
from asyncdcp.runs.history import append_history, stage_times
from asyncdcp.runs.layout import TRACES, UNCLAIMED, step_name, step_of
from asyncdcp.runs.listing import Known, Mode
from asyncdcp.runs.writer import RunWriter
from asyncdcp.storage import Place
from asyncdcp.trace import chrome_trace

TAKEOVER_DEADLINE = 120.0
"""How long, in seconds, saves of earlier writers that still move are waited for."""

FETCH_DEADLINE = 1800.0
"""How long, in seconds, the other ranks wait while rank 0 fetches a checkpoint from the mirror."""


class Standing(msgspec.Struct, frozen=True):
    """Where this writer stands, alike on all ranks: its term, and the newest checkpoint on its line."""

    term: int = UNCLAIMED
    head: str | None = None
    step: int = -1
    begun: bool = False
    """Whether the term has a line, so that saves may go on from there."""


@dataclass
class Finished:
    """A save that was committed, as the manager saw it."""

    step: int
    result: SaveResult
    metrics: dict[str, float | None] = field(default_factory=dict)
    called_seconds: float = 0.0


class RunSession:
    """``standing`` may be read from any thread; all else runs on one loop. ``registry`` has the keys, ``chain`` is what
    saves are made with.

    What is said of the line (``good``, ``latest`` …) raises ``KeyUnavailable`` where its end is encrypted and no key is
    at hand: nobody is to go on from an older checkpoint for want of a key.
    """

    def __init__(
        self,
        place: Place,
        ranks: Ranks,
        reporter: Reporter,
        keep: Retention | None,
        quiet: float,
        registry: ExtensionRegistry,
    ) -> None:
        self.standing = Standing()
        self._place = place
        self._ranks = ranks
        self._reporter = reporter
        self._keep = keep
        self._quiet = quiet
        self._registry = registry
        self._writer = RunWriter(place, registry)
        self.mirror: Mirror | None = None
        self.chain = PLAIN
        self._known = Known()
        self._looking, self._writing = asyncio.Lock(), asyncio.Lock()  # anyio's would be of the caller's loop

    async def open(self) -> None:
        """Claims the run's next term and settles what earlier ones have in flight. On all ranks."""
        if self.mirror is None:
            self.standing = await said(self._ranks, "opened", self._open, Standing)
        else:
            self.standing = await chosen(self._ranks, "opened", self._open, Standing, deadline=self._patience)

    async def _open(self) -> Standing:
        if self._ranks.rank:
            return self.standing
        if self.mirror is not None and (fetched := await self.mirror.fetch()) is not None:
            say_fetched(self._reporter, fetched, self.mirror, NOT_WHOLE)
        run, settled = await self._writer.open(quiet=self._quiet, deadline=TAKEOVER_DEADLINE)
        for name, save_id in settled.aborted:
            message = f"{name}: its save was cut off, and is given up"
            self._reporter.emit("settled", message, step_of(name), save_id=save_id)
        self._reporter.emit("opened", f"opened as term {self._writer.term}", term=self._writer.term)
        head = run.latest()
        return _standing(self._writer.term, head)

    async def begin(self) -> None:
        """The line goes on from the newest checkpoint, for a first save before anything was restored. On rank 0."""
        async with self._writing:
            if not self._writer.begun:
                await self._writer.go_on((await self._writer.look()).latest())
            self.standing = msgspec.structs.replace(self.standing, begun=True)

    def committed(self, step: int, save_id: str) -> None:
        """A save of this writer is the newest checkpoint now."""
        if step > self.standing.step:
            self.standing = msgspec.structs.replace(self.standing, head=save_id, step=step)

    async def look(self) -> Run:
        """The run as it is now, on this rank alone."""
        async with self._looking:
            run = await look(self._place, self._known, self._registry)
        run.refuse_checkpoint()
        return run

    async def good(self) -> list[Checkpoint]:
        """The checkpoints that count."""
        return (await self._readable()).good()

    async def steps(self) -> list[int]:
        """Their steps."""
        return (await self._readable()).steps()

    async def latest(self) -> Checkpoint | None:
        """The newest one."""
        return (await self.look()).latest()

    async def best(self, metric: str, mode: Mode) -> Checkpoint | None:
        """The one with the least, or greatest, metric."""
        return (await self._readable()).best(metric, mode)

    async def _readable(self) -> Run:
        run = await self.look()
        run.latest()
        return run

    async def load(self, number: int, checkpoint: int | Checkpoint, load: LoadFrom) -> Any:
        """What ``load`` makes of it. Changes nothing about the run. On all ranks; ``number`` as for ``restore``."""
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = await self._found(number, checkpoint)
        return await load_checkpoint(self._place, checkpoint, load)

    async def _found(self, number: int, step: int) -> Checkpoint:
        """The checkpoint of a step as rank 0 sees it: what one rank does not find yet, none would load without it."""

        async def find() -> Choice:
            return Choice([]) if self._ranks.rank else one(self._place, await self.look(), step)

        choice = await chosen(self._ranks, _candidates(number), find, Choice)
        return choice.candidates[0]

    async def refuse(self, number: int, error: AsyncDCPError) -> None:
        """Instead of ``load`` or ``restore``: this rank has refused the call, so that the others need not wait."""
        await leave(self._ranks, _candidates(number), error)

    # ── restoring ──

    async def restore(
        self, number: int, step: int | None, load: LoadFrom, ready: Callable[[], Awaitable[None]], *, writes: bool
    ) -> Checkpoint | None:
        """Loads a step, or the newest that can be loaded; with ``writes`` the line goes on from it. On all ranks.

        Begins once ``ready`` returns. Where one rank fails or is cancelled, the others do not wait for it; and
        ``number``, which counts the calls, keeps what they agree on for the next one apart from what is left of this.
        """
        choosing = Choosing(self._place, self.look, self._reporter, self.mirror, step)
        async with AsyncExitStack() as turn:

            async def choose() -> Choice:
                await ready()
                await turn.enter_async_context(self._writing)
                return Choice([]) if self._ranks.rank else await choosing.first()

            async def load_one(checkpoint: Checkpoint) -> None:
                await load_checkpoint(self._place, checkpoint, load)

            choice = await chosen(self._ranks, _candidates(number), choose, Choice, deadline=self._patience)
            begun = time.monotonic()
            topic = f"restored {number}"
            instead = partial(self._instead, number, choosing)
            restored = await load_first(self._ranks, topic, choice.candidates, load_one, instead)
            if restored is not None:
                seconds = time.monotonic() - begun
                self._reporter.emit("restored", f"restored step {restored.step}", restored.step, seconds=seconds)
            if writes:
                self.standing = await said(self._ranks, f"standing {number}", lambda: self._go_on(restored), Standing)
            return restored

    async def _instead(
        self, number: int, choosing: Choosing, damaged: Checkpoint, error: AsyncDCPError, older: list[Checkpoint]
    ) -> list[Checkpoint]:
        """What all ranks try after one that is damaged."""

        async def choose() -> Choice:
            return Choice([]) if self._ranks.rank else await choosing.instead(damaged, error, older)

        choice = await chosen(self._ranks, _candidates(number), choose, Choice, deadline=self._patience)
        left = choice.candidates
        if left and left[0].step != damaged.step:
            say_fallback(self._reporter, damaged, error)
        return left

    @property
    def _patience(self) -> float | None:
        """How long ranks wait for rank 0 where it may fetch; None for as long as they always do."""
        return None if self.mirror is None else FETCH_DEADLINE

    async def _go_on(self, base: Checkpoint | None) -> Standing:
        """From the newest checkpoint there is nothing to tell apart: the line goes on as it is. A change of it that has
        begun comes to its end even if cancelled: else what is saved next might not be on it.
        """
        head = (await self._writer.look()).latest()
        if not self._writer.begun or (head.save_id if head else None) != (base.save_id if base else None):
            with CancelScope(shield=True):
                await self._writer.go_on(base)
        self.standing = _standing(self._writer.term, base, begun=True)
        return self.standing

    async def tell_failures(self, find: Callable[[], Awaitable[list[BaseException]]]) -> list[BaseException]:
        """What has failed here, or else what other ranks say has failed on them. On all ranks; one that is cancelled
        fails the others.
        """
        try:
            failures = await find()
        except BaseException as error:
            await leave(self._ranks, "waited", error)
            raise
        if self._ranks.world_size == 1:
            return failures
        own = in_words(failures[0]) if failures else ""
        told = [each.decode() for each in await gather(self._ranks, "waited", own.encode())]
        others = [PeerFailed(f"rank {rank} failed: {text}", rank=rank) for rank, text in enumerate(told) if text]
        return failures or [*others]

    # ── after a save ──

    async def finish(self, finished: Finished) -> None:
        """Writes history and trace of a committed save, and deletes what need not be kept. On rank 0.

        ``Fenced`` if another writer has taken the run over: then nothing is deleted.
        """
        async with self._writing:
            try:
                run = await self._writer.look()
            except Fenced as error:
                self._reporter.emit("fenced", str(error), term=error.term)
                raise
            try:
                await append_history(self._place, self._line_of(finished, run), self.chain)
                if self._reporter.telemetry.traces:
                    await self._write_trace(finished)
            finally:  # what cannot be written, for want of room maybe, must not keep room from being made
                await self._retain(finished.step, run)

    async def _retain(self, step: int, run: Run) -> None:
        if self._keep is not None:
            spared = None if self.mirror is None else self.mirror.copying
            for gone in await self._writer.retain(self._keep, run, step, spared=spared):
                self._reporter.emit("deleted", f"step {gone.step} is deleted", gone.step, save_id=gone.save_id)

    async def follow(self) -> None:
        """Brings the mirror up to date, if there is one. On rank 0."""
        if self.mirror is not None:
            for copied in await self.mirror.follow():
                text = f"step {copied.step} is copied to {self.mirror.location}"
                self._reporter.emit("mirrored", text, copied.step, save_id=copied.save_id)

    def _line_of(self, finished: Finished, run: Run) -> Saved:
        """Sizes are those of the whole save, as its Record has them; times are this rank's."""
        result = finished.result
        whole = next((each.summary for each in run.checkpoints if each.save_id == result.save_id), None) or result
        return Saved(
            step=finished.step,
            term=self.standing.term,
            save_id=result.save_id,
            time=time.time(),
            tensors=whole.tensors,
            tensor_bytes=whole.tensor_bytes,
            stored_bytes=whole.stored_bytes,
            called_seconds=finished.called_seconds,
            staged_seconds=result.staged_seconds,
            durable_seconds=result.durable_seconds,
            stage_seconds=dict(result.stage_seconds),
            stages=stage_times(result.spans),
            metrics=finished.metrics,
        )

    async def _write_trace(self, finished: Finished) -> None:
        name = f"{step_name(finished.step)}-{finished.result.save_id}.json"
        await self._place.child(TRACES).put(name, chrome_trace(finished.result.spans, f"save step {finished.step}"))


def _candidates(number: int) -> str:
    """What the ranks call their choice in the call of this number."""
    return f"candidates {number}"


def _standing(term: int, head: Checkpoint | None, *, begun: bool = False) -> Standing:
    return Standing(term, head.save_id, head.step, begun) if head else Standing(term, begun=begun)
