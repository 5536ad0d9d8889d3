"""Loading one checkpoint of a run, which retention may delete meanwhile."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from asyncdcp.errors import CheckpointGone, CheckpointNotFound, CorruptCheckpoint, StorageError
from asyncdcp.runs import Checkpoint
from asyncdcp.runs.deletion import check_there
from asyncdcp.runs.view import SaveView
from asyncdcp.storage import Place, Storage

LoadFrom: TypeAlias = Callable[[Storage], Awaitable[Any]]
"""Loads from a storage that holds one checkpoint."""


async def load_checkpoint(place: Place, checkpoint: Checkpoint, load: LoadFrom) -> Any:
    """What ``load`` makes of the checkpoint's storage, which shows this one save. ``CheckpointGone`` if it was deleted
    before all of it was read.
    """
    assert checkpoint.save_id is not None
    storage = place.child(checkpoint.name)
    await check_there(storage, checkpoint.save_id)
    try:
        return await load(SaveView(storage, checkpoint.save_id))
    except (CorruptCheckpoint, CheckpointNotFound, StorageError) as error:
        try:
            await check_there(storage, checkpoint.save_id)
        except CheckpointGone as gone:
            raise gone from error
        except StorageError:
            pass  # what the load has met says more
        raise
