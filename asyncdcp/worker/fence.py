"""The trainer's side settles a save whose worker cannot: it is dead, or neither answers nor dies.

The Record decides, as between ranks: the trainer claims an abort. Won, the save is given up for all time, and a worker
that wakes later finds that out. Lost, the Record says what became of it; a commit counts.
"""

from __future__ import annotations

import logging

from asyncdcp.errors import AsyncDCPError, StorageError
from asyncdcp.extensions import PLAIN, Chain, Seals
from asyncdcp.metadata import Record
from asyncdcp.names import index_name, record_name
from asyncdcp.pipeline.commit import CommitMachine, State
from asyncdcp.pipeline.messages import Saved, SaveJob
from asyncdcp.pipeline.records import commit_unknown, peer_error, read_record
from asyncdcp.pipeline.settle import GiveUpSignal, Reason, Settlement
from asyncdcp.storage import Storage

_logger = logging.getLogger("asyncdcp")

_PEER = 1  # any rank but the committer's: to the trainer, a commit may be out already


async def settle_without_worker(
    job: SaveJob, storage: Storage, reason: Reason, chain: Chain = PLAIN, *, dead: bool
) -> Saved:
    """Returns if the worker has committed the save; else raises ``reason.error`` once it is sure that it never will
    be, ``CommitUnknown`` if that cannot be told.

    ``dead`` says that the worker's end is confirmed. Only then is removed what it wrote, and only then is a missing
    Record as good as an abort.
    """
    if dead and await _has_no_trace(job, storage):
        raise reason.error
    signal = GiveUpSignal()
    signal.set(reason)
    settlement = Settlement(job, storage, signal, None, chain)
    settlement.machine = CommitMachine(_PEER)
    state = await settlement.run()
    if state is State.UNKNOWN:
        state, settlement.record = await _look(job, storage, chain, dead=dead)
    if state is State.COMMITTED and settlement.record is not None:
        return _saved(settlement.record, storage)
    if state is State.UNKNOWN:
        raise commit_unknown(storage.info.location, reason.error) from reason.error
    if dead:
        await _discard(job, storage)
    raise _error(job, storage, settlement.record) or reason.error


async def _has_no_trace(job: SaveJob, storage: Storage) -> bool:
    """Whether a dead worker never came to write, and no other rank waits for word: then no abort is needed."""
    try:
        return job.world_size == 1 and not _own(job, await storage.list(), record_name(job.save_id))
    except AsyncDCPError:
        return False


async def _look(job: SaveJob, storage: Storage, chain: Chain, *, dead: bool) -> tuple[State, Record | None]:
    """What the worker left, where an abort could not be claimed. A commit counts once it is durable from here: the
    worker may have ended between the Record's link and the sync of its directory. No Record of a dead worker: there
    will be none from this rank, and a sole rank has not committed.
    """
    try:
        record = await read_record(storage, job.save_id, Seals.of(chain))
        if record.outcome == "commit":
            await storage.barrier()
    except FileNotFoundError:
        return (State.FAILED if dead and job.rank == 0 else State.UNKNOWN), None
    except AsyncDCPError:
        return State.UNKNOWN, None
    return (State.COMMITTED if record.outcome == "commit" else State.ABORTED), record


async def _discard(job: SaveJob, storage: Storage) -> None:
    try:
        await storage.delete(_own(job, await storage.list()))
    except StorageError as error:
        _logger.warning("the rest of a given-up save could not be deleted: %s", error)


def _own(job: SaveJob, names: dict[str, int], *more: str) -> list[str]:
    """This rank's files of the save, without its Record unless asked for by ``more``."""
    index = index_name(job.save_id, job.rank)
    return [name for name in names if name.startswith(f"{job.save_id}-{job.rank}-") or name in (index, *more)]


def _error(job: SaveJob, storage: Storage, record: Record | None) -> AsyncDCPError | None:
    if record is None or record.rank is None or record.rank == job.rank:
        return None
    return peer_error(record, storage.info.location)


def _saved(record: Record, storage: Storage) -> Saved:
    """What can be said of a commit whose worker could not say it; the times are the trace's."""
    return Saved(
        save_id=record.save_id,
        stored_bytes=record.summary.stored_bytes if record.summary else 0,
        replaced=record.replaces,
        filesystem=storage.info.filesystem,
        seconds={},
    )
