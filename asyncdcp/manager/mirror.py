"""A second place for a run: checkpoints are committed near by, and copied far away in the background.

The near place alone decides; the mirror follows it. Where the near place has lost what the mirror still has (a new
machine, a full disk that was wiped), the newest checkpoint is fetched from there before the run is opened, so that
restoring and the line go on as if it had never been away. What turns out damaged near by as it is loaded is taken from
there, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Container, Sequence
from operator import attrgetter

from asyncdcp.errors import AsyncDCPError, CorruptCheckpoint, KeyUnavailable
from asyncdcp.extensions import ExtensionRegistry
from asyncdcp.pipeline.verify import verify
from asyncdcp.runs import Checkpoint, Line, Retention, Run, look, to_delete
from asyncdcp.runs.collection import delete_checkpoint
from asyncdcp.runs.copying import copy_checkpoint, copy_lines, missing
from asyncdcp.runs.listing import Known
from asyncdcp.runs.saves import SaveView
from asyncdcp.storage import Place
from asyncdcp.trace import Trace

_logger = logging.getLogger("asyncdcp.manager")


class Mirror:
    """Keeps ``far`` like ``near``, but for what ``keep`` says of it. Used on one loop, by one process: rank 0's."""

    def __init__(
        self, near: Place, far: Place, keep: Retention | None, registry: ExtensionRegistry | None = None
    ) -> None:
        self._near = near
        self._far = far
        self._keep = keep
        self._registry = registry
        self._known_near, self._known_far = Known(), Known()
        self._lock = asyncio.Lock()
        self._wanted = False
        self.copying: str | None = None
        """The save id of what is copied to the far place just now: not to be deleted near by until that is done."""

    @property
    def location(self) -> str:
        """The far place, for people."""
        return self._far.storage.info.location

    async def follow(self) -> list[Checkpoint]:
        """Copies what the far place lacks, or has lost files of, newest first, then deletes there what need not be
        kept; returns the copied.

        Calls while one is under way are one more round of it, together. What was deleted near by before it is copied is
        passed over, with a warning in the log.
        """
        self._wanted = True
        copied: list[Checkpoint] = []
        async with self._lock:
            while self._wanted:
                self._wanted = False
                try:
                    copied += await self._round()
                except asyncio.CancelledError:
                    self._wanted = True  # by those that wait for this round, too
                    raise
        return copied

    async def _round(self) -> list[Checkpoint]:
        near, far = await self._look()
        await copy_lines(self._near, near, self._far, far)
        wanted = missing(near, far)
        if self._keep is not None:
            union = sorted([*far.good(), *wanted], key=lambda checkpoint: checkpoint.step)
            spared = {checkpoint.save_id for checkpoint in to_delete(self._keep, union)}
            wanted = [checkpoint for checkpoint in wanted if checkpoint.save_id not in spared]
        copied = []
        for checkpoint in wanted:
            self.copying = checkpoint.save_id
            try:
                if await self._replace(self._near, self._far, checkpoint, far):
                    copied.append(checkpoint)
            except CorruptCheckpoint as error:
                _logger.error("step %d is damaged in %s, and stays so: %s", checkpoint.step, self.location, error)
            finally:
                self.copying = None
        if self._keep is not None:
            for checkpoint in to_delete(self._keep, (await self._look())[1].checkpoints):
                assert checkpoint.save_id is not None
                await delete_checkpoint(self._far, checkpoint.name, checkpoint.save_id, self._registry)
        return copied

    async def fetch(self) -> Checkpoint | None:
        """Copies the far place's newest whole checkpoint to the near one, if that has none so new, or has lost files of
        it; returns it.

        Where the near place has a checkpoint, a far one that does not answer is no reason not to train: it is logged,
        and the near place counts alone. Where it has none, the error is raised: the training would begin anew.
        ``KeyUnavailable`` where a newest checkpoint is encrypted and cannot be told.
        """
        async with self._lock:
            near = await look(self._near, self._known_near, self._registry)
            here = near.latest()
            try:
                far = await look(self._far, self._known_far, self._registry)
                far.latest()
                line = max(far.line, near.line, key=attrgetter("term"))  # the near place may have gone another way
                wanted = _between(far, line, -1 if here is None else here.step, None)
                if wanted:
                    await copy_lines(self._far, far, self._near, near)
                return await self._bring(wanted, near)
            except KeyUnavailable:
                raise
            except AsyncDCPError as error:
                if here is None:
                    error.args = (
                        f"{near.location} has no checkpoint, and what its mirror {self.location} has cannot be "
                        f"fetched: {error}. To begin anew all the same, leave mirror= out, or give another from now on",
                    )
                    raise
                _logger.error("nothing is fetched from %s: %s", self.location, error)
                return None

    async def fetch_between(self, beyond: int, last: int, tried: Container[str | None] = ()) -> Checkpoint | None:
        """Copies the far place's newest whole checkpoint of the steps after ``beyond`` up to ``last`` to the near one,
        in the place of what is damaged there; returns it. ``tried`` are save ids that will not do.

        None where it has none on the near place's line, and, with an error in the log, where it cannot be had.
        """
        async with self._lock:
            try:
                near, far = await self._look()
                wanted = [each for each in _between(far, near.line, beyond, last) if each.save_id not in tried]
                return await self._bring(wanted, near)
            except AsyncDCPError as error:
                _logger.error("nothing is fetched from %s: %s", self.location, error)
                return None

    async def _bring(self, wanted: Sequence[Checkpoint], near: Run) -> Checkpoint | None:
        """The first that can be copied near by; where none can, since they are damaged, ``CorruptCheckpoint``."""
        damage: CorruptCheckpoint | None = None
        for checkpoint in wanted:
            if damage is not None:
                _logger.error("an older one is fetched: %s", damage)
            try:
                size = f"{checkpoint.size:,} bytes"  # it may take long
                _logger.warning("step %d is being fetched from %s: %s", checkpoint.step, self.location, size)
                if await self._replace(self._far, self._near, checkpoint, near):
                    return checkpoint
            except CorruptCheckpoint as error:
                damage = error
        if damage is not None:
            raise damage
        return None

    async def _replace(self, source: Place, target: Place, checkpoint: Checkpoint, there: Run) -> bool:
        """Copies it to ``target``, in the place of what that has of it, damaged; False for what was deleted before.
        ``CorruptCheckpoint`` if it is damaged, too.
        """
        assert checkpoint.save_id is not None
        try:
            if any(own.save_id == checkpoint.save_id and own.state != "partial" for own in there.checkpoints):
                await self._make_way(source, target, checkpoint.name, checkpoint.save_id)
            return await copy_checkpoint(
                source.child(checkpoint.name), target.child(checkpoint.name), checkpoint.save_id
            )
        except FileNotFoundError:
            where, to = source.storage.info.location, target.storage.info.location
            _logger.warning("step %d is not copied to %s: it was deleted in %s before", checkpoint.step, to, where)
            return False

    async def _make_way(self, source: Place, target: Place, name: str, save_id: str) -> None:
        """What is damaged may be all that there is to salvage, so it goes only once every byte of the other has been
        verified.
        """
        report = await verify(SaveView(source.child(name), save_id), Trace(), self._registry)
        if not report.ok:
            raise CorruptCheckpoint(f"{report.path} is damaged, too: {report.damages[0].message}", path=report.path)
        await delete_checkpoint(target, name, save_id, self._registry)

    async def _look(self) -> tuple[Run, Run]:
        near = await look(self._near, self._known_near, self._registry)
        return near, await look(self._far, self._known_far, self._registry)


def _between(far: Run, line: Line, beyond: int, last: int | None) -> list[Checkpoint]:
    """The far place's checkpoints of these steps on a line, newest first."""
    steps = [each for each in far.checkpoints if each.step > beyond and (last is None or each.step <= last)]
    whole = [each for each in steps if each.state == "committed" and line.holds(each.term, each.step)]
    return whole[::-1]
