"""Settling a save: ``commit.py`` decides, this carries it out against a storage and brings back what was seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import anyio
import msgspec
from anyio import to_thread
from msgspec import structs
from msgspec.structs import replace

from asyncdcp.envelope import Unseal, encode_record, trusting
from asyncdcp.errors import (
    AsyncDCPError,
    CheckpointExists,
    CommitUnknown,
    CorruptCheckpoint,
    DeadlineExceeded,
    Fenced,
    StorageError,
    StructureChanged,
    reading,
)
from asyncdcp.extensions import PLAIN, Chain, Seals
from asyncdcp.metadata import Index, IndexRef, Record, Summary
from asyncdcp.names import index_name, record_name, record_save_id
from asyncdcp.pipeline.commit import Action, CommitMachine, Event, State
from asyncdcp.pipeline.globs import idle_everywhere, nothing_matched
from asyncdcp.pipeline.messages import SaveJob
from asyncdcp.pipeline.records import (
    KEYS,
    cause_of,
    destroyed_records,
    kind_of,
    known_error,
    live_commits,
    read_index,
    read_record,
    read_records,
)
from asyncdcp.pipeline.union import Union, check_sizes, differing_values, unite
from asyncdcp.planning.division import replica_mismatch
from asyncdcp.storage.port import Storage
from asyncdcp.unwinding import cancelled_by_others

_POLL_SECONDS = 0.02
_POLL_LIMIT_SECONDS = 2.0
_LOOK_SECONDS = 5.0
"""How long a rank looks for whose fault a deadline is."""

_DCP_SUFFIX = ".distcp"

_FAILED = {
    Action.LIST: Event.GIVE_UP,
    Action.CHECK: Event.GIVE_UP,
    Action.AWAIT_RECORD: Event.GIVE_UP,
    Action.CLAIM_COMMIT: Event.CLAIM_UNKNOWN,
    Action.CLAIM_ABORT: Event.CLAIM_UNKNOWN,
    Action.READ_RECORD: Event.STORAGE_FAILED,
    Action.PUBLISH: Event.STORAGE_FAILED,
}
"""What it means that an action raised, whatever it raised."""


@dataclass(frozen=True)
class Reason:
    """Why a save is given up; ``error`` is what to raise for it on this rank, and its message goes into the abort."""

    kind: str
    error: AsyncDCPError


class GiveUpSignal:
    """Set once, by whoever first has a reason to give the save up; later reasons change nothing. Lives on the loop."""

    def __init__(self) -> None:
        self.reason: Reason | None = None
        self._event = anyio.Event()
        self._listener: Callable[[], None] | None = None

    def set(self, reason: Reason) -> None:
        """Gives up."""
        if self.reason is None:
            self.reason = reason
            self._event.set()
            if self._listener is not None:
                self._listener()

    def attach(self, listener: Callable[[], None]) -> None:
        """Calls ``listener`` when the signal is set, or at once if it is."""
        self._listener = listener
        if self.reason is not None:
            listener()

    async def wait(self, timeout: float) -> bool:
        """Whether the save is given up, ``timeout`` seconds from now at the latest."""
        with anyio.move_on_after(timeout):
            await self._event.wait()
        return self.reason is not None


class Settlement:
    """Takes one rank's save from "prepared" or "given up" to a final state. Whatever fails meanwhile does not raise: it
    becomes the reason to give up.

    ``own`` refers to this rank's Index, None where it never came to writing one; unless ``give_up`` is set, it is
    durable. ``stored_bytes`` are those of this rank's data files. ``chain`` seals the Record and opens those that are
    there. After ``run``, ``record`` is the Record that counts, where it was written or read.
    """

    def __init__(
        self, job: SaveJob, storage: Storage, give_up: GiveUpSignal, own: IndexRef | None, chain: Chain = PLAIN
    ) -> None:
        self._job = job
        self._sealer = chain.sealer(job.save_id)
        self._unseal = Seals.of(chain)
        self._storage = storage
        self._give_up = give_up
        self._own = own
        self._delay = _POLL_SECONDS
        self._indexes: list[IndexRef] = []
        self._replaces: list[str] = []
        self._summary: Summary | None = None
        self.machine = CommitMachine(job.rank)
        self.stored_bytes = 0
        self.record: Record | None = None

    async def run(self) -> State:
        """Returns a state of ``commit.FINAL``."""
        perform = {
            Action.LIST: self._list,
            Action.CHECK: self._check,
            Action.CLAIM_COMMIT: self._claim_commit,
            Action.CLAIM_ABORT: self._claim_abort,
            Action.AWAIT_RECORD: self._await_record,
            Action.READ_RECORD: self._found,
            Action.PUBLISH: self._publish,
        }
        event = Event.GIVE_UP if self._own is None or self._give_up.reason else Event.PREPARED
        while (action := self.machine.on(event)) is not Action.FINISH:
            try:
                with cancelled_by_others():
                    event = await perform[action]()
            except Exception as error:  # noqa: BLE001  # every rank must come to a final state
                known = known_error(error, self._storage.info.location)
                self._give_up.set(Reason(kind_of(known), known))
                event = _FAILED[action]
        return self.machine.state

    async def _pause(self) -> bool:
        """Waits before the next look at the storage, longer each time; True if the save was given up meanwhile."""
        delay, self._delay = self._delay, min(self._delay * 1.5, _POLL_LIMIT_SECONDS)
        return await self._give_up.wait(delay)

    async def _list(self) -> Event:
        """Looks for the indexes of all ranks. A single rank has nobody to wait for."""
        job = self._job
        if job.world_size == 1:
            return Event.INDEXES_COMPLETE
        names = await self._storage.list()
        if record_name(job.save_id) in names:
            return await self._found()
        if all(index_name(job.save_id, rank) in names for rank in range(job.world_size)):
            return Event.INDEXES_COMPLETE
        return Event.GIVE_UP if await self._pause() else Event.INDEXES_MISSING

    async def _check(self) -> Event:
        """Checks that the indexes cover the state, and what the commit will replace."""
        await self._check_indexes()
        self._replaces = await existing_commits(self._storage, self._job, self._unseal)
        return Event.GIVE_UP if self._give_up.reason else Event.COVERED

    async def _check_indexes(self) -> None:
        """Nothing is committed that a reader would refuse."""
        job = self._job
        assert self._own is not None
        if job.world_size == 1:  # one rank's own plan covers what it holds by construction
            self._indexes = [self._own]
            self._summary = Summary(job.tensors, job.tensor_bytes, self.stored_bytes, job.transforms)
            return
        await self._storage.barrier()  # an index can be seen before its rank has made its name durable
        ranks = range(job.world_size)
        stored = [await read_index(self._storage, job.save_id, rank, unseal=self._unseal) for rank in ranks]
        union = await to_thread.run_sync(_united, [found.content for found in stored])
        check_sizes(union.files.values(), await self._storage.list())
        await self._check_keys([found.content for found in stored])
        self._indexes = [found.ref for found in stored]
        stored_bytes = sum(file.stored_size for file in union.files.values())
        self._summary = Summary(len(union.tensors), union.tensor_bytes, stored_bytes, job.transforms)

    async def _check_keys(self, indexes: Sequence[Index]) -> None:
        """What was chosen of the state is there: one rank may have nothing of it, but not all."""
        if not self._job.keys or self._job.world_size == 1:  # a rank that is alone has looked before
            return
        trees = (msgspec.json.decode(index.plan.tree) for index in indexes)
        idle = await to_thread.run_sync(idle_everywhere, self._job.keys, trees)
        if idle:
            error = nothing_matched(idle, "the state of any rank", self._storage.info.location)
            self._give_up.set(Reason(KEYS, error))
            raise error

    async def _claim_commit(self) -> Event:
        record = self._new_record("commit")
        return await self._claim(replace(record, replaces=self._replaces, indexes=self._indexes, summary=self._summary))

    async def _claim_abort(self) -> Event:
        await self._name_the_missing()
        reason = self._give_up.reason
        cause = cause_of(reason.kind, reason.error) if reason else "the commit could not be claimed"
        late = reason.error.rank if reason is not None and reason.kind == "deadline" else None
        rank = self._job.rank if late is None else late
        return await self._claim(replace(self._new_record("abort"), rank=rank, cause=cause))

    async def _name_the_missing(self) -> None:
        """A deadline that has passed is somebody's fault: that of the ranks whose Index is not there, if that can be
        seen; where all are there, that of the committer.
        """
        job, reason = self._job, self._give_up.reason
        if job.world_size == 1 or self._own is None or reason is None or reason.kind != "deadline":
            return
        with anyio.move_on_after(_LOOK_SECONDS):
            try:
                names = await self._storage.list()
            except Exception:  # noqa: BLE001  # the abort matters more than whom it names
                return
            missing = [rank for rank in range(job.world_size) if index_name(job.save_id, rank) not in names]
            if record_name(job.save_id) in names:  # who gave up before has told, and cleaned up
                return
            shown = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
            late = f"what is missing is of rank {shown}" if missing else "rank 0 was to commit and did not"
            error = DeadlineExceeded(f"{reason.error}; {late}", path=reason.error.path)
            error.rank = missing[0] if missing else 0
            self._give_up.reason = Reason(reason.kind, error)

    def _new_record(self, outcome: Literal["commit", "abort"]) -> Record:
        """What commit and abort have in common."""
        job = self._job
        record = Record(job.save_id, outcome, time.time(), job.world_size, job.versions, metadata=job.metadata)
        return replace(record, **structs.asdict(job.run)) if job.run else record

    async def _claim(self, record: Record) -> Event:
        try:
            data = await to_thread.run_sync(encode_record, record, self._sealer)
            won = await self._storage.claim(record_name(record.save_id), data)
        except StorageError as error:
            if isinstance(error, CommitUnknown):
                raise
            self._give_up.set(Reason("failed", error))
            return Event.CLAIM_FAILED
        if won:
            self.record = record
        return Event.WON if won else Event.LOST

    async def _await_record(self) -> Event:
        try:
            return await self._found()
        except FileNotFoundError:
            return Event.GIVE_UP if await self._pause() else Event.RECORD_MISSING

    async def _found(self) -> Event:
        self.record = await read_record(self._storage, self._job.save_id, self._unseal)
        if self.record.outcome == "abort":
            return Event.FOUND_ABORT
        if self._own not in self.record.indexes:
            path = f"{self._storage.info.location}/{record_name(self._job.save_id)}"
            raise CorruptCheckpoint(f"{path} commits something else than what this rank wrote", path=path)
        return Event.FOUND_COMMIT

    async def _publish(self) -> Event:
        """A commit that another process claimed is durable for this rank once its directory is, from here."""
        await self._storage.barrier()
        return Event.PUBLISHED


def _united(indexes: Sequence[Index]) -> Union:
    """The indexes' union. ``StructureChanged`` where they do not fit together; ``ReplicaMismatch`` where plain values
    that are no rank's own differ, of which a reader would see only one.
    """
    try:
        union = unite(indexes)
    except CorruptCheckpoint as error:
        raise StructureChanged(
            f"what the ranks hold does not fit together ({error}); they agree anew, and the next save is complete if "
            "it does by then",
            tensors=error.tensors,
        ) from error
    differing = differing_values(indexes)
    if differing:
        raise replica_mismatch(
            list(differing), [f"{name} has another value on rank {rank}" for name, rank in differing.items()]
        )
    return union


async def existing_commits(storage: Storage, job: SaveJob, unseal: Unseal = trusting) -> list[str]:
    """The save ids of the commits that a new one at this place takes the place of; ``CheckpointExists`` if there are
    some and it may not, ``Fenced`` if a later term of its run has committed here.

    All commits, not only live ones, so that what an earlier overwrite left undeleted is named, too. In a run a Record
    whose bytes are damaged is taken for a commit: a training that fell back from it comes to its step again. A
    checkpoint of torch.distributed.checkpoint is replaced by nobody: beside it, it would be hidden.
    """
    names = await storage.list()
    location = storage.info.location
    if any(name.endswith(_DCP_SUFFIX) for name in names):
        way_out = "save to another path" if job.run is None else "give the run a directory of its own"
        found = f"a checkpoint of torch.distributed.checkpoint (*{_DCP_SUFFIX}), or what is left of one,"
        message = f"there is {found} at {location}; {way_out}"
        raise CheckpointExists(message, path=location)
    others = [name for name in names if name != record_name(job.save_id)]
    destroyed = [] if job.run is None else await destroyed_records(storage, others)
    term = job.run.term if job.run else 0
    with reading(location, "Save to another path"):
        records = await read_records(storage, [name for name in names if record_save_id(name) not in destroyed], unseal)
    live = live_commits(records)
    later = [record.term for record in live if record.term is not None and record.term > term]
    if job.run is not None and later:
        raise Fenced(
            f"term {max(later)} of the run has committed {location}, and this writer has term {term}: another one has "
            "taken the run over",
            path=location,
            term=max(later),
        )
    standing = live if job.run is None else [record for record in live if (record.term or 0) == term]
    if standing and not job.overwrite:
        raise CheckpointExists(
            f"there is a checkpoint at {location} already; save to another path, or with overwrite=True", path=location
        )
    return [*destroyed, *(record.save_id for record in records if record.outcome == "commit")]
