"""A second place for a run: checkpoints are committed near by, and copied far away in the background.

The near place alone decides; the mirror follows it. Where the near place has lost what the mirror still has (a new
machine, a full disk that was wiped), the newest checkpoint is fetched from there before the run is opened, so that
restoring and the line go on as if it had never been away.
"""

from __future__ import annotations

import logging

import anyio

from asyncdcp.errors import AsyncDCPError, KeyUnavailable
from asyncdcp.extensions import ExtensionRegistry
from asyncdcp.runs import Checkpoint, Retention, Run, look, to_delete
from asyncdcp.runs.copying import copy_checkpoint, copy_lines, missing
from asyncdcp.runs.deletion import delete_checkpoint
from asyncdcp.runs.listing import Known
from asyncdcp.storage import Place

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
        self._lock = anyio.Lock()
        self._wanted = False

    @property
    def location(self) -> str:
        """The far place, for people."""
        return self._far.storage.info.location

    async def follow(self) -> list[Checkpoint]:
        """Copies what the far place lacks, newest first, then deletes there what need not be kept; returns the copied.

        Calls while one is under way are one more round of it, together. What is deleted near by while it is copied is
        passed over.
        """
        self._wanted = True
        copied: list[Checkpoint] = []
        async with self._lock:
            while self._wanted:
                self._wanted = False
                copied += await self._round()
        return copied

    async def _round(self) -> list[Checkpoint]:
        near, far = await self._look()
        await copy_lines(self._near, near, self._far, far)
        wanted = missing(near, far)
        if self._keep is not None:
            union = sorted([*far.good(), *wanted], key=lambda checkpoint: checkpoint.step)
            spared = {checkpoint.save_id for checkpoint in to_delete(self._keep, union)}
            wanted = [checkpoint for checkpoint in wanted if checkpoint.save_id not in spared]
        copied = [checkpoint for checkpoint in wanted if await self._copy(self._near, self._far, checkpoint)]
        if self._keep is not None:
            for checkpoint in to_delete(self._keep, (await self._look())[1].checkpoints):
                assert checkpoint.save_id is not None
                await delete_checkpoint(self._far, checkpoint.name, checkpoint.save_id, self._registry)
        return copied

    async def fetch(self) -> Checkpoint | None:
        """Copies the far place's newest checkpoint to the near one, if that has none so new; returns it.

        A far place that does not answer is no reason not to train: it is logged, and the near place counts alone.
        ``KeyUnavailable`` where a newest checkpoint is encrypted and cannot be told.
        """
        async with self._lock:
            try:
                near, far = await self._look()
                newest, here = far.latest(), near.latest()
                if newest is None or (here is not None and here.step >= newest.step):
                    return None
                if near.term > far.term:  # the near place has gone another way since: rolled back, or begun anew
                    return None
                await copy_lines(self._far, far, self._near, near)
                return newest if await self._copy(self._far, self._near, newest) else None
            except KeyUnavailable:
                raise
            except AsyncDCPError as error:
                _logger.error("%s could not be looked at, and is not restored from: %s", self.location, error)
                return None

    async def _look(self) -> tuple[Run, Run]:
        near = await look(self._near, self._known_near, self._registry)
        return near, await look(self._far, self._known_far, self._registry)

    async def _copy(self, source: Place, target: Place, checkpoint: Checkpoint) -> bool:
        assert checkpoint.save_id is not None
        try:
            return await copy_checkpoint(
                source.child(checkpoint.name), target.child(checkpoint.name), checkpoint.save_id
            )
        except FileNotFoundError:
            return False
