"""Loading one checkpoint of a run, which retention may delete meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from anyio import CancelScope

from asyncdcp.errors import (
    AsyncDCPError,
    CheckpointGone,
    CheckpointNotFound,
    CorruptCheckpoint,
    StorageError,
    StorageUnavailable,
)
from asyncdcp.futures import CheckpointFuture, work_of
from asyncdcp.metadata import RECORD_LIMIT
from asyncdcp.names import record_name
from asyncdcp.runs import Checkpoint
from asyncdcp.runs.collection import check_there
from asyncdcp.runs.saves import SaveView
from asyncdcp.storage import Place, Storage

LoadFrom: TypeAlias = Callable[[Storage], CheckpointFuture[Any]]
"""Begins to load from a storage that holds one checkpoint."""


class _Committed(SaveView):
    """Says so where the save is gone, so that what is left of it is never taken for a checkpoint. The load asks, and
    not who begins it: what one of several ranks meets before they load together, the others would not hear of.
    """

    async def list(self) -> dict[str, int]:
        names = await super().list()
        if record_name(self.save_id) not in names:
            raise CheckpointGone(
                f"the checkpoint at {self.info.location} was deleted before it was read; read a newer one",
                path=self.info.location,
            )
        return names


async def load_checkpoint(place: Place, checkpoint: Checkpoint, load: LoadFrom) -> Any:
    """What ``load`` makes of the checkpoint's storage, which shows this one save; its report is that of the work that
    this is a part of. ``CheckpointGone`` if it was deleted before all of it was read.

    Who is cancelled gives the load up, and goes on when nothing writes to the state any more.
    """
    assert checkpoint.save_id is not None
    storage = place.child(checkpoint.name)
    loading = load(_Committed(storage, checkpoint.save_id))
    try:
        loaded = await loading
        work_of.get().report = loading.report
        return loaded
    except CheckpointGone:
        raise
    except (CorruptCheckpoint, CheckpointNotFound, StorageError) as error:
        try:
            await check_there(storage, checkpoint.save_id)
        except CheckpointGone as gone:
            raise gone from error
        except StorageError:
            pass  # what the load has met says more
        raise
    finally:
        loading.cancel()  # of no effect where it is done
        with CancelScope(shield=True):
            await loading.settled()
        del loading  # it has the error, whose traceback has this


async def check_allowed(place: Place, checkpoint: Checkpoint) -> None:
    """``StorageUnavailable`` where a listing takes for damaged what this process has no right to read: that may be
    whole.
    """
    storage = place.child(checkpoint.name)
    try:
        if checkpoint.save_id is None:
            await storage.list()
        else:
            await storage.get(record_name(checkpoint.save_id), RECORD_LIMIT)
    except StorageUnavailable:
        raise
    except (OSError, EOFError, AsyncDCPError):
        pass  # it is damaged
