"""Choosing: which checkpoints there are to restore, as rank 0 sees them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from asyncdcp.errors import AsyncDCPError, CheckpointNotFound, CorruptCheckpoint, KeyUnavailable
from asyncdcp.manager.mirror import Mirror
from asyncdcp.manager.reading import check_allowed
from asyncdcp.manager.telemetry import Reporter
from asyncdcp.pipeline.formats import newest_foreign
from asyncdcp.runs import Checkpoint, Run
from asyncdcp.runs.layout import UNCLAIMED, step_of
from asyncdcp.storage import Place

NOT_WHOLE: Final = "the run has it no more, or not whole"


class Choice(msgspec.Struct):
    """What rank 0 offers to restore, the first choice first."""

    candidates: list[Checkpoint]


class Choosing:
    """What one restore may load, of ``step`` or, where that is None, of the newest steps. On rank 0."""

    def __init__(
        self,
        place: Place,
        look: Callable[[], Awaitable[Run]],
        reporter: Reporter,
        mirror: Mirror | None,
        step: int | None,
    ) -> None:
        self._place = place
        self._look = look
        self._reporter = reporter
        self._mirror = mirror
        self._step = step
        self._fetched: set[str | None] = set()

    async def first(self) -> Choice:
        """The good checkpoints, newest first; or that of the step. From the mirror what is not near by, or damaged."""
        run = await self._look()
        if self._step is None:
            return await newest_first(self._place, await self._mended(run), self._reporter)
        if run.find(self._step) is None:
            fetched = await self._fetch(self._step - 1, self._step, NOT_WHOLE)
            if fetched is not None:
                return Choice([fetched])
        return one(self._place, run, self._step)

    async def instead(self, damaged: Checkpoint, error: AsyncDCPError, older: list[Checkpoint]) -> Choice:
        """After one that is damaged: what the mirror has of that step, or of one beyond the older ones; then those."""
        beyond = max((each.step for each in older), default=-1) if self._step is None else self._step - 1
        fetched = await self._fetch(beyond, damaged.step, f"step {damaged.step} cannot be loaded: {error}")
        return Choice(older if fetched is None else [fetched, *older])

    async def _mended(self, run: Run) -> Run:
        """The run, with what the mirror has of the damaged checkpoints beyond the newest good one."""
        newest, broken = run.latest(), broken_beyond(run)
        if self._mirror is None or not broken:
            return run
        for each in broken:
            await check_allowed(self._place, each)
        last = broken[-1]
        why = f"step {last.step} cannot be loaded: {last.cause or 'it cannot be read'}"
        fetched = await self._fetch(-1 if newest is None else newest.step, last.step, why)
        return run if fetched is None else await self._look()

    async def _fetch(self, beyond: int, last: int, why: str) -> Checkpoint | None:
        if self._mirror is None:
            return None
        fetched = await self._mirror.fetch_between(beyond, last, self._fetched)
        if fetched is not None:
            self._fetched.add(fetched.save_id)
            say_fetched(self._reporter, fetched, self._mirror, why)
        return fetched


async def newest_first(place: Place, run: Run, reporter: Reporter) -> Choice:
    """All good checkpoints. Says which newer ones are damaged; ``CorruptCheckpoint`` if nothing else is there, and
    ``KeyUnavailable`` where the newest cannot be told.
    """
    run.latest()
    good, broken = run.good()[::-1], broken_beyond(run)
    for each in broken:
        await check_allowed(place, each)
    for each in broken if good else ():
        say_fallback(reporter, each, CorruptCheckpoint(each.cause or "it cannot be read", path=each.name))
    if broken and not good:
        location = place.storage.info.location
        raise CorruptCheckpoint(
            f"no checkpoint in {location} is whole: {broken[-1].name}: {broken[-1].cause}; to begin anew, use "
            "another directory for the run",
            path=location,
        )
    if not good and (foreign := await newest_foreign(place, run)) is not None:
        reporter.emit(
            "foreign",
            f"there is nothing to resume from, but {foreign} holds a checkpoint of another format: to go on from "
            f"it, load it by its path (AsyncCheckpointer.load), and give the run a directory of its own",
            step_of(foreign),
        )
    return Choice(good)


def broken_beyond(run: Run) -> list[Checkpoint]:
    """The damaged checkpoints that may be newer than any good one, oldest first."""
    newest = max((each.step for each in run.good()), default=-1)
    damaged = [each for each in run.checkpoints if each.state == "damaged" and each.step > newest]
    return [each for each in damaged if each.on_line or each.term == UNCLAIMED]


def one(place: Place, run: Run, step: int) -> Choice:
    """The good checkpoint of a step; ``CheckpointNotFound``, or ``KeyUnavailable`` if that may be the reason."""
    found = run.find(step)
    if found is None:
        location = place.storage.info.location
        others = [each for each in run.checkpoints if each.step == step]
        for each in others:
            if each.state == "encrypted":
                raise KeyUnavailable(f"{each.name} of {location} cannot be read: {each.cause}", path=location)
        why = f" ({others[-1].state}{': ' + others[-1].cause if others[-1].cause else ''})" if others else ""
        raise CheckpointNotFound(
            f"no checkpoint of step {step} on the line of {location}{why}; there are {_shown(run.steps())}",
            path=location,
        )
    return Choice([found])


def say_fallback(reporter: Reporter, checkpoint: Checkpoint, error: AsyncDCPError) -> None:
    """Tells that progress is lost, and why."""
    reporter.emit(
        "fallback",
        f"step {checkpoint.step} cannot be restored, an older one is tried: {error}",
        checkpoint.step,
        cause=str(error),
    )


def say_fetched(reporter: Reporter, checkpoint: Checkpoint, mirror: Mirror, why: str) -> None:
    """Tells that the near place had it not, or not whole."""
    text = f"step {checkpoint.step} is fetched from {mirror.location}: {why}"
    reporter.emit("fetched", text, checkpoint.step, save_id=checkpoint.save_id, cause=why)


def _shown(steps: list[int]) -> str:
    if not steps:
        return "none"
    return ", ".join(map(str, steps)) if len(steps) <= 8 else f"{', '.join(map(str, steps[:3]))} … {steps[-1]}"
