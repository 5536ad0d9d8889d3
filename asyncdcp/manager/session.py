"""RunSession: a manager's dealings with its run, on the manager's own loop. Rank 0 writes; the others hear of it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import anyio
import msgspec

from asyncdcp.errors import AsyncDCPError, CheckpointNotFound, CorruptCheckpoint, Fenced, KeyUnavailable, PeerFailed
from asyncdcp.extensions import PLAIN, ExtensionRegistry
from asyncdcp.manager.mirror import Mirror
from asyncdcp.manager.reading import LoadFrom, load_checkpoint
from asyncdcp.manager.restoring import chosen, load_first, said
from asyncdcp.manager.telemetry import Reporter
from asyncdcp.pipeline.newest_foreign import newest_foreign
from asyncdcp.ranks import Ranks, gather
from asyncdcp.results import SaveResult
from asyncdcp.runs import Checkpoint, Retention, Run, Saved, look
from asyncdcp.runs.history import append_history, stage_times
from asyncdcp.runs.layout import TRACES, step_name, step_of
from asyncdcp.runs.lineage import UNCLAIMED
from asyncdcp.runs.listing import Known, Mode
from asyncdcp.runs.writer import RunWriter
from asyncdcp.storage import Place
from asyncdcp.trace import chrome_trace

TAKEOVER_DEADLINE = 120.0
"""How long, in seconds, saves of earlier writers that still move are waited for."""


class Standing(msgspec.Struct, frozen=True):
    """Where this writer stands, alike on all ranks: its term, and the newest checkpoint on its line."""

    term: int = UNCLAIMED
    head: str | None = None
    step: int = -1
    begun: bool = False
    """Whether the term has a line, so that saves may go on from there."""


class _Choice(msgspec.Struct):
    """What rank 0 offers to restore, the first choice first."""

    candidates: list[Checkpoint]


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
        self._looking, self._writing = anyio.Lock(), anyio.Lock()

    async def open(self) -> None:
        """Claims the run's next term and settles what earlier ones have in flight. On all ranks."""
        self.standing = await said(self._ranks, "opened", self._open, Standing)

    async def _open(self) -> Standing:
        if self.mirror is not None and (fetched := await self.mirror.fetch()) is not None:
            text = f"step {fetched.step} is fetched from {self.mirror.location}"
            self._reporter.emit("fetched", text, fetched.step, save_id=fetched.save_id)
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

    async def load(self, checkpoint: int | Checkpoint, load: LoadFrom) -> Any:
        """What ``load`` makes of it. Changes nothing about the run."""
        if not isinstance(checkpoint, Checkpoint):
            (checkpoint,) = (await self._one(checkpoint)).candidates
        return await load_checkpoint(self._place, checkpoint, load)

    # ── restoring ──

    async def restore(
        self, number: int, step: int | None, load: LoadFrom, ready: Callable[[], Awaitable[None]], *, writes: bool
    ) -> Checkpoint | None:
        """Loads a step, or the newest that can be loaded; with ``writes`` the line goes on from it. On all ranks.

        Begins once ``ready`` returns. Where one rank fails or is cancelled, the others do not wait for it; and
        ``number``, which counts the calls, keeps what they agree on for the next one apart from what is left of this.
        """
        async with AsyncExitStack() as turn:

            async def choose() -> _Choice:
                await ready()
                await turn.enter_async_context(self._writing)
                if self._ranks.rank:
                    return _Choice([])
                return await (self._newest() if step is None else self._one(step))

            async def load_one(checkpoint: Checkpoint) -> None:
                await load_checkpoint(self._place, checkpoint, load)

            choice = await chosen(self._ranks, f"candidates {number}", choose, _Choice)
            begun = time.monotonic()
            topic = f"restored {number}"
            restored = await load_first(self._ranks, topic, choice.candidates, load_one, self._fell_back)
            if restored is not None:
                seconds = time.monotonic() - begun
                self._reporter.emit("restored", f"restored step {restored.step}", restored.step, seconds=seconds)
            if writes:
                self.standing = await said(self._ranks, f"standing {number}", lambda: self._go_on(restored), Standing)
            return restored

    async def _newest(self) -> _Choice:
        run = await self._readable()
        good = run.good()[::-1]
        newest = good[0].step if good else -1
        damaged = [each for each in run.checkpoints if each.state == "damaged" and each.step > newest]
        broken = [each for each in damaged if each.on_line or each.term == UNCLAIMED]
        for each in broken:
            self._fell_back(each, CorruptCheckpoint(each.cause or "it cannot be read", path=each.name))
        if broken and not good:
            location = self._place.storage.info.location
            raise CorruptCheckpoint(
                f"no checkpoint in {location} is whole: {broken[-1].name}: {broken[-1].cause}; to begin anew, use "
                "another directory for the run",
                path=location,
            )
        if not good and (foreign := await newest_foreign(self._place, run)) is not None:
            self._reporter.emit(
                "foreign",
                f"there is nothing to resume from, but {foreign} holds a checkpoint of another format: to go on from "
                f"it, load it by its path (AsyncCheckpointer.load), and give the run a directory of its own",
                step_of(foreign),
            )
        return _Choice(good)

    async def _one(self, step: int) -> _Choice:
        run = await self.look()
        found = run.find(step)
        if found is None:
            location = self._place.storage.info.location
            others = [each for each in run.checkpoints if each.step == step]
            for each in others:
                if each.state == "encrypted":
                    raise KeyUnavailable(f"{each.name} of {location} cannot be read: {each.cause}", path=location)
            why = f" ({others[-1].state}{': ' + others[-1].cause if others[-1].cause else ''})" if others else ""
            raise CheckpointNotFound(
                f"no checkpoint of step {step} on the line of {location}{why}; there are {_shown(run.steps())}",
                path=location,
            )
        return _Choice([found])

    async def _go_on(self, base: Checkpoint | None) -> Standing:
        """From the newest checkpoint there is nothing to tell apart: the line goes on as it is."""
        head = (await self._writer.look()).latest()
        if not self._writer.begun or (head.save_id if head else None) != (base.save_id if base else None):
            await self._writer.go_on(base)
        return _standing(self._writer.term, base, begun=True)

    def _fell_back(self, checkpoint: Checkpoint, error: AsyncDCPError) -> None:
        self._reporter.emit(
            "fallback",
            f"step {checkpoint.step} cannot be restored, an older one is tried: {error}",
            checkpoint.step,
            cause=str(error),
        )

    async def tell_failures(self, failures: list[BaseException]) -> list[BaseException]:
        """What other ranks say has failed on them. On all ranks."""
        if self._ranks.world_size == 1:
            return []
        own = f"{type(failures[0]).__name__}: {failures[0]}" if failures else ""
        told = [each.decode() for each in await gather(self._ranks, "waited", own.encode())]
        return [PeerFailed(f"rank {rank} failed: {text}", rank=rank) for rank, text in enumerate(told) if text]

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
            await append_history(self._place, self._line_of(finished, run), self.chain)
            if self._reporter.telemetry.traces:
                await self._write_trace(finished)
            if self._keep is not None:
                for gone in await self._writer.retain(self._keep, run, finished.step):
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


def _standing(term: int, head: Checkpoint | None, *, begun: bool = False) -> Standing:
    return Standing(term, head.save_id, head.step, begun) if head else Standing(term, begun=begun)


def _shown(steps: list[int]) -> str:
    if not steps:
        return "none"
    return ", ".join(map(str, steps)) if len(steps) <= 8 else f"{', '.join(map(str, steps[:3]))} … {steps[-1]}"
