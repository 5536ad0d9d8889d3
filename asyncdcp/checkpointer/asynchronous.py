"""AsyncCheckpointer: every verb starts the work on the checkpointer's own event loop and returns a future."""

from __future__ import annotations

import threading
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from anyio import to_thread
from torch.distributed import ProcessGroup

from asyncdcp.checkpointer.handles import Guards, PendingSaves, SaveHandle
from asyncdcp.checkpointer.jobs import plain_json
from asyncdcp.checkpointer.lanes import Lanes
from asyncdcp.checkpointer.planner import SaveName, SaveOrder, SavePlanner, SaveWords
from asyncdcp.checkpointer.read_verbs import OnProgress, Place, ReadVerbs
from asyncdcp.checkpointer.saving import SaveRequest, SaveTask
from asyncdcp.closing import weakly
from asyncdcp.config import Options, check_flags, known_options
from asyncdcp.engine import Engine
from asyncdcp.errors import (
    CheckpointerBusy,
    Closed,
    DeadlineExceeded,
    SaveSkipped,
    WouldDeadlock,
)
from asyncdcp.extensions import Chain, Extension, ExtensionRegistry, known_extensions
from asyncdcp.format.blocks import SLAB_BYTES
from asyncdcp.futures import CheckpointFuture
from asyncdcp.metadata import RunStamp
from asyncdcp.pipeline.records import known_error
from asyncdcp.pipeline.session import ThreadPipeline
from asyncdcp.planning import Structure
from asyncdcp.planning.held_chunks import Holdings
from asyncdcp.ranks import Ranks, find_ranks, first_rank
from asyncdcp.staging import Arenas, EagerBudget, Guard, Sources
from asyncdcp.state_dict.flatten import FlatState, flatten
from asyncdcp.state_dict.pruning import select
from asyncdcp.storage import Storage, open_storage
from asyncdcp.storage.memory import VolatileWarnings
from asyncdcp.worker.launch import is_supported
from asyncdcp.worker.pipeline import ProcessPipeline

PROCESS_BY_DEFAULT = is_supported()
"""On Linux, unless the system is so old or so confined that a process cannot be watched there."""


class AsyncCheckpointer(ReadVerbs):
    """Saves and loads states without stopping the caller.

    Guaranteed: verbs return at once (``save`` flattens the state and encodes its plain values before it returns, no
    more); saves are staged and committed in the order of the calls; an error that nobody looked at surfaces at the next
    verb or at ``close``, as ``options.on_error`` says. Verbs may be called from any thread; a future may be awaited on
    any loop or blocked on with ``result()``.

    Tensors must not be changed between ``save`` and ``staged``. A context manager, plain or async; leaving it closes.
    One that is dropped unclosed warns (``ResourceWarning``); at the interpreter's exit it is closed, so that pending
    saves are committed. In a process made by ``os.fork()`` every verb raises ``Closed``.

    ``process=True``, the default on Linux, runs the pipeline in a background process that outlives this one: what was
    ``staged`` is committed even if this process is killed. ``process=False`` runs it on a thread. Saves to a storage
    that the background process cannot open run on the thread, and ``ThreadPipelineWarning`` says so once.

    ``process_group`` says which ranks save and load together: None stands for torch's default group where there is one,
    else for this process alone; ``SoleRank()`` for this process alone in any case. ``ranks`` are these ranks, for
    agreements of the program's own.

    ``extensions`` transform the data of every save, left to right: ``ZStandard()``, ``BytePlanes()``, ``AESGCM(key)``,
    or your own. They serve loads too, which find by name what else a checkpoint was made with: the built-in ones,
    installed ones, and those in ``registry``. An extension that the background process cannot make an equal of
    (``Extension.travel``) keeps saves on a thread, and ``ThreadPipelineWarning`` says so once.

    >>> import asyncio
    >>> weight = torch.ones(3)
    >>> async def main() -> None:
    ...     async with asyncdcp.AsyncCheckpointer() as checkpointer:
    ...         save = checkpointer.save("step_1", {"weight": weight, "epoch": 1})  # returns at once
    ...         await save.staged
    ...         weight.zero_()  # now it may change
    ...         result = await save  # durable and committed
    ...         print(f"{result.tensors} tensor of {result.tensor_bytes} bytes")
    ...         print(await checkpointer.load("step_1", {"weight": weight, "epoch": 0}))
    >>> asyncio.run(main())
    1 tensor of 12 bytes
    {'weight': tensor([1., 1., 1.]), 'epoch': 1}
    """

    _noun = "checkpointer"

    def __init__(
        self,
        options: Options | None = None,
        *,
        process: bool = PROCESS_BY_DEFAULT,
        process_group: ProcessGroup | Ranks | None = None,
        extensions: Sequence[Extension] = (),
        registry: ExtensionRegistry | None = None,
    ) -> None:
        check_flags(process=process)
        self._options = known_options(options)
        self.ranks = find_ranks(process_group, self._options.agreement_deadline)
        self._chain = Chain(extensions)
        self._chain.warn_of_order()
        self._registry = known_extensions(registry, extensions)
        self._lock = threading.RLock()  # reentrant, as all here: a signal's handler may save in the middle of a save
        self._planner = SavePlanner(self.ranks, self._options, self._chain)
        pipeline = ProcessPipeline(self._options) if process else ThreadPipeline()
        self._lanes = Lanes(Arenas(SLAB_BYTES, self._options.staging_bytes), pipeline)
        self._pending = PendingSaves(self._options.on_error)
        self._eager = EagerBudget(self._options.eager_bytes)
        self._volatile = VolatileWarnings()
        self._closed = self._ended = False
        self._engine = Engine(
            "asyncdcp",
            drain=weakly(self.close),
            exit_deadline=self._options.close_deadline,
            grace=min(self._options.settle_seconds, 5.0),
        )
        self._guards = Guards(self._pending, self._engine, self._options.guard_deadline)
        self._planner.run_id = self._agree_on_run(uuid.uuid4().hex)

    def _agree_on_run(self, run_id: str) -> str:
        """Rank 0's. Waits until all ranks have made their checkpointer."""
        if self.ranks.world_size == 1:
            return run_id
        try:
            agreed = self._engine.submit(self.ranks.decide, "the making of a checkpointer", run_id.encode(), first_rank)
            return agreed.result().decode()
        except BaseException:
            self._closed = True
            self._engine.close(0)
            raise

    # ── save ──

    def save(  # noqa: PLR0913  # each is one word of the user's
        self,
        path: Place,
        state: Mapping[Any, Any],
        *,
        overwrite: bool = False,
        metadata: Mapping[str, Any] | None = None,
        keys: Sequence[str] | None = None,
        allow_pickle: bool = False,
        on_progress: OnProgress | None = None,
    ) -> SaveHandle:
        """Begins to save ``state`` as the checkpoint at ``path``, and returns its handle.

        ``path`` is a directory, made where it is missing, or a ``Storage``. A checkpoint that is there already fails
        the save (``CheckpointExists``); with ``overwrite`` it stays whole until the new one is committed, and is
        deleted then, but for one of ``torch.distributed.checkpoint``, which is never replaced. ``metadata`` is anything
        that JSON can carry (so that nan becomes None), up to 32 MiB, kept in the checkpoint's Record. ``keys`` are
        globs of FQNs: only these are stored (dicts lose other entries; a list is stored whole if any entry of it is).
        Each glob has to match something; on several ranks, which all give the same, on one of them, or the futures
        raise ``InvalidOption``. ``allow_pickle=True`` pickles what could not be stored otherwise; it has to be given
        again at load. ``on_progress`` is called with ``Progress`` on a thread of its own.

        Raises at once, with nothing begun: ``UnsupportedValue`` and ``DuplicateName`` for what cannot be stored;
        ``InvalidOption``; ``CheckpointerBusy``; ``Closed``; ``UnseenFailure`` of an earlier save. The futures raise
        ``CheckpointExists``, ``MemoryLimit``, ``StorageError`` and its kin, ``DeadlineExceeded``, ``SaveSkipped``,
        ``Cancelled``, ``CommitUnknown``.
        """
        return self._save(path, state, SaveWords(overwrite, metadata, keys, allow_pickle, on_progress))

    def _save(
        self, path: Place, state: Mapping[Any, Any], words: SaveWords, stamp: Callable[[], RunStamp] | None = None
    ) -> SaveHandle:
        """``save``, with what a manager's saves say of their run. What fails there fails all ranks."""
        begun = time.monotonic()
        self._check_open()
        storage = open_storage(path)
        name = self._planner.name(storage.info.location)
        try:
            check_flags(overwrite=words.overwrite, allow_pickle=words.allow_pickle)
            self._pending.surface()
            run = None if stamp is None else stamp()
            order = SaveOrder(name, storage, words.overwrite, plain_json("metadata", words.metadata), words.keys, run)
            with self._pending.entering() as busy:
                if busy and self._options.when_busy != "queue":
                    return self._refuse(name, storage)
                self._volatile.warn_of(storage)
                self._lanes.pipeline.warn_unless_travels(storage, self._chain)
                flat = flatten(state, allow_pickle=words.allow_pickle)
                if words.keys is not None:
                    flat = select(flat, words.keys, alone=self.ranks.world_size == 1)
                return self._begin(order, flat, words.on_progress, begun)
        except Exception as error:  # what a state_dict raises, too
            self._tell_peers(name, storage, error)
            raise

    def _begin(self, order: SaveOrder, flat: FlatState, on_progress: OnProgress | None, begun: float) -> SaveHandle:
        described = self._planner.describe(flat)
        trace = self._trace(0, on_progress)
        plan = self._planner.planning(order, flat, described, trace)
        statefuls = (taken.stateful for taken in flat.statefuls.values())
        sources = Sources(list(described.sources), self._guards.active(), statefuls, self._eager)
        try:
            tell_peers = partial(self._planner.tell_peers, order.name, order.storage)
            renew = partial(self._engine.submit, self._planner.renew, order.name)
            request = SaveRequest(order.storage, plan, tell_peers, renew, sources, trace, begun, self._chain)
            return self._started(SaveTask(request, self._engine, self._lanes, self._options))
        except BaseException:  # Control-C: the eager copies would count for good
            sources.drop()
            raise

    def _started(self, task: SaveTask) -> SaveHandle:
        try:
            with self._lock:
                self._check_open()
                self._engine.submit(task.run, name=f"save to {task.handle.path}")
                self._pending.add(task.handle)
        except BaseException:  # it may have begun, and nobody has its handle
            task.handle.cancel()
            raise
        return task.handle

    def _tell_peers(self, name: SaveName, storage: Storage, error: Exception) -> None:
        """Of a save that this rank has refused."""
        if self.ranks.world_size > 1:
            with suppress(Closed):
                self._engine.submit(self._planner.tell_peers, name, storage, known_error(error, storage.info.location))

    def prepare(self, state: Mapping[Any, Any]) -> CheckpointFuture[None]:
        """Plans saves of this structure, takes the arena's memory and starts the background process ahead, so that the
        first save is as fast as the next.

        Nothing is copied or written. Several ranks agree on who writes what, so all of them call it. Raises as ``save``
        does for what cannot be stored; the future raises ``MemoryLimit``, ``ReplicaMismatch``, ``PeerFailed``.
        """
        self._enter()
        flat = flatten(state)
        described = self._planner.describe(flat)
        if self.ranks.world_size == 1:
            plan = self._planner.plan(described.structure)
            return self._engine.submit(self._lanes.prepare, len(plan.slabs), name="prepare")
        held = self._planner.held(flat, described, marked=True)
        return self._engine.submit(self._prepare, described.structure, held, name="prepare")

    async def _prepare(self, structure: Structure, held: Holdings) -> None:
        share = await self._planner.agreements.prepare(structure, held)
        plan = await to_thread.run_sync(self._planner.plan, share.structure)
        await self._lanes.prepare(len(plan.slabs))

    def guard(self, *optimizers: torch.optim.Optimizer) -> Guard:
        """Makes every ``step`` of the optimizers wait until pending saves have copied their tensors; nothing else
        waits.

        From then on nothing that a save copies can change under it: the optimizers' parameters and states, because of
        that wait; parameters without gradient, because nobody changes them; and the rest of a state (buffers,
        averages), because it is cloned before ``save`` returns, up to ``options.eager_bytes``. Beyond that it is copied
        in the background: call ``wait_staged`` before changing it. A step that has waited ``options.guard_deadline``
        drops the save.

        ``InvalidOption`` for what has no step hook. The guard ends with its ``remove()``, its context, or the
        checkpointer.

        >>> parameter = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = torch.optim.SGD([parameter], lr=1.0)
        >>> parameter.grad = torch.ones(3)
        >>> with asyncdcp.AsyncCheckpointer(process=False) as checkpointer, checkpointer.guard(optimizer):
        ...     save = checkpointer.save("guarded", {"weight": parameter})
        ...     optimizer.step()  # waits until the parameter has been copied
        ...     _ = save.result()
        ...     print(checkpointer.load("guarded").result()["weight"].tolist(), parameter.tolist())
        [1.0, 1.0, 1.0] [0.0, 0.0, 0.0]
        """
        self._enter()
        return self._guards.add(optimizers)

    def wait_staged(self) -> CheckpointFuture[None]:
        """Resolves once every save that was called before has copied its tensors, or has failed: they may be changed
        then.
        """
        self._check_open()
        return self._pending.all_staged(self._engine)

    def _refuse(self, name: SaveName, storage: Storage) -> SaveHandle:
        """What becomes of a save while another is under way, if it is not to wait."""
        location = storage.info.location
        if self._options.when_busy == "error":
            raise CheckpointerBusy(
                f"the save to {location} was refused: an earlier one is under way, and when_busy='error'", path=location
            )
        handle = SaveHandle(location, self._engine.future("staging"), self._engine.future(f"save to {location}"))
        skipped = SaveSkipped(
            f"the save to {location} was skipped: an earlier one is under way, and when_busy='skip'", path=location
        )
        self._tell_peers(name, storage, skipped)
        handle.staged.fail(skipped)
        handle.committed.fail(skipped)
        return handle

    # ── the end ──

    def close(self) -> None:
        """Waits for pending saves, up to ``options.close_deadline``, and ends the engine; safe to call twice, and from
        several threads, of which each waits. One that was interrupted (Control-C) can be called again, and is at the
        interpreter's exit.

        Saves that are not done then are given up, and what does not even settle in ``options.settle_seconds`` is left
        behind; ``DeadlineExceeded`` names them. Loads that are not done get ``settle_seconds``, too. Also raises what
        failed unseen, as ``options.on_error`` says. After it, verbs raise ``Closed``. In a forked child it does
        nothing: the saves are the parent's.
        """
        if self._engine.inherited:
            return
        if self._engine.owns_current_thread():
            raise WouldDeadlock("close() in a done callback would wait for that very callback")
        with self._lock:
            self._closed = True
        if self._ended:
            return
        for guard in self._guards.active():
            guard.remove()
        given_up = self._pending.give_up(self._options.close_deadline, self._options.settle_seconds)
        stuck = self._end_engine()
        self._ended = True
        if given_up or stuck is not None:
            raise self._pending.late(given_up, self._options.close_deadline, stuck) from stuck
        self._pending.surface(awaited=True)

    def _end_engine(self) -> DeadlineExceeded | None:
        """Ends the thread; what it raised if it had to be left behind."""
        if self._engine.started:
            with suppress(Closed):  # its thread could not be started
                self._engine.call(self._lanes.arenas.close)
                self._engine.call(self._engine.submit, self._lanes.pipeline.aclose)
        try:
            self._engine.close(self._options.settle_seconds)
        except DeadlineExceeded as error:
            return error
        return None

    def __del__(self) -> None:
        """Warns; saves under way still end, at the latest at the interpreter's exit."""
        engine: Engine | None = vars(self).get("_engine")
        if engine is None or self._closed or not engine.started or engine.inherited:
            return
        warnings.warn(f"unclosed {self!r}: its thread lives on", ResourceWarning, source=self, stacklevel=2)
        self._pending.log_unseen()
        with suppress(Closed):
            engine.call(engine.submit, self._lanes.leave)
