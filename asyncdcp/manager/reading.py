"""Loading one checkpoint of a run, which retention may delete meanwhile."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeAlias

from asyncdcp.errors import CheckpointNotFound, CorruptCheckpoint, StorageError
from asyncdcp.runs import Checkpoint
from asyncdcp.runs.deletion import gone_instead
from asyncdcp.runs.view import SaveView
from asyncdcp.storage import Place, Storage

LoadFrom: TypeAlias = Callable[[Storage], Awaitable[Any]]
"""Loads from a storage that holds one checkpoint."""


async def load_checkpoint(place: Place, checkpoint: Checkpoint, load: LoadFrom) -> Any:
    """What ``load`` makes of the checkpoint's storage, which shows this one save. ``CheckpointGone`` if it was deleted
    before all of it was read.
    """
    assert checkpoint.save_id is not None
    try:
        return await load(SaveView(place.child(checkpoint.name), checkpoint.save_id))
    except (CorruptCheckpoint, CheckpointNotFound, StorageError) as error:
        told: Exception = error
        with suppress(StorageError):
            told = await gone_instead(place, checkpoint.name, checkpoint.save_id, error)
        if told is error:
            raise
        raise told from error
