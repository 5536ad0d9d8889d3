"""CheckpointManager: the checkpoints of a run, by steps instead of paths."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Self, SupportsFloat

import torch
from torch.distributed import ProcessGroup

from asyncdcp.checkpointer import AsyncCheckpointer, SaveHandle
from asyncdcp.checkpointer.asynchronous import PROCESS_BY_DEFAULT
from asyncdcp.checkpointer.planner import SaveWords
from asyncdcp.checkpointer.read_verbs import OnProgress
from asyncdcp.closing import weakly
from asyncdcp.config import Options, check_flags, known_options
from asyncdcp.engine import Engine
from asyncdcp.errors import CheckpointExists, DeadlineExceeded, InvalidOption, PeerFailed, UsageError
from asyncdcp.extensions import Chain, Extension, ExtensionRegistry, known_extensions
from asyncdcp.futures import CheckpointFuture
from asyncdcp.manager.deciding import Decider
from asyncdcp.manager.ending import Ending
from asyncdcp.manager.mirror import Mirror
from asyncdcp.manager.policies import EverySeconds, OnPreemption, SaveWhen, check_policies
from asyncdcp.manager.preemption import Preemption
from asyncdcp.manager.read_verbs import ReadVerbs
from asyncdcp.manager.saves import Called, Saves, as_numbers, surface
from asyncdcp.manager.session import RunSession
from asyncdcp.manager.telemetry import Reporter, Telemetry
from asyncdcp.metadata import RunStamp
from asyncdcp.ranks import Ranks, find_ranks
from asyncdcp.runs import Retention
from asyncdcp.runs.layout import check_step, step_name
from asyncdcp.runs.retention import check_retention
from asyncdcp.staging import Guard
from asyncdcp.storage import Place, open_place


class CheckpointManager(ReadVerbs):
    """Saves, restores and keeps the checkpoints of the run in a directory (a path, a ``file://`` URL or a ``Place``).

    Opening for writing claims the run's next *term*, waits for what earlier writers have in flight, and gives up what
    does not move for ``takeover_seconds``. From then on any earlier writer is ``Fenced``. With ``read_only=True``
    nothing is claimed and nothing written. A context manager, plain or async, that opens the run on entering; without
    it, the first verb opens it, and waits for that. Leaving it waits until the last save is durable.

    - Only checkpoints on the run's *line* count: what a rollback left behind, and what a fenced writer committed
      late, is whole but never ``latest``, and retention neither counts nor deletes it.
    - ``keep`` says what to keep (``KeepLast(3) | KeepEvery(1000)``), None keeps all. A checkpoint is deleted only
      after a newer one was committed; the newest good one never is.
    - ``save_when`` says when ``should_save`` is true: policies or functions of a ``Moment``; every ten minutes if
      nothing is given.
    - Keys of encrypted checkpoints are those of ``extensions`` and ``registry``, or of the environment. Where the
      newest checkpoint hides its metadata and its key is not at hand, opening raises ``KeyUnavailable`` before it
      claims anything, and so does whatever is asked about the line.
    - ``mirror`` is a second place, such as ``"s3://bucket/run"``: what is committed is copied there in the
      background, and ``mirror_keep`` says what to keep there. Opening fetches its newest checkpoint where the run has
      none so new, and restoring what the run has damaged or not any more.
    - Of a failure that nobody looked at, ``options.on_error`` decides, at the next verb or at the end. In a job of
      several ranks it comes up on all of them at the same step, in ``should_save``, or in ``wait``.

    On all ranks the same verbs are called in the same order. Verbs start the work and return a future, as those of
    ``AsyncCheckpointer``, whose ``options``, ``process``, ``process_group``, ``extensions`` and ``registry`` these are.

    >>> state = {"model": torch.nn.Linear(4, 2), "progress": {"step": 0}}
    >>> keep, when = asyncdcp.KeepLast(2), asyncdcp.EverySteps(10)
    >>> with asyncdcp.CheckpointManager("runs/gpt", keep=keep, save_when=when) as manager:
    ...     print(manager.restore_latest(state).result())  # None: there is nothing yet
    ...     for step in range(1, 31):
    ...         state["progress"]["step"] = step
    ...         if manager.should_save(step):
    ...             _ = manager.save(step, state, metrics={"loss": 1 / step})
    ...     manager.wait().result()
    ...     print(manager.steps().result())
    None
    [20, 30]
    """

    _noun = "manager"

    def __init__(  # noqa: PLR0913  # each is one word of the user's
        self,
        run: str | os.PathLike[str] | Place,
        *,
        keep: Retention | None = None,
        save_when: SaveWhen | None = None,
        options: Options | None = None,
        process: bool = PROCESS_BY_DEFAULT,
        process_group: ProcessGroup | Ranks | None = None,
        extensions: Sequence[Extension] = (),
        registry: ExtensionRegistry | None = None,
        read_only: bool = False,
        takeover_seconds: float = 5.0,
        telemetry: Telemetry | None = None,
        mirror: str | os.PathLike[str] | Place | None = None,
        mirror_keep: Retention | None = None,
    ) -> None:
        check_flags(process=process, read_only=read_only)
        self._place = open_place(run)
        self.location = self._place.storage.info.location
        policies = check_policies(EverySeconds(600.0) if save_when is None else save_when)
        retention = None if keep is None else check_retention("keep", keep)
        known = isinstance(takeover_seconds, (int, float)) and not isinstance(takeover_seconds, bool)
        if not known or not takeover_seconds >= 0:
            raise InvalidOption(f"takeover_seconds takes a number of seconds from 0 up, not {takeover_seconds!r}")
        self.read_only = read_only
        self._options = known_options(options)
        ranks = find_ranks(process_group, self._options.agreement_deadline)
        self._alone, self._leads = ranks.world_size == 1, ranks.rank == 0
        self._lock = threading.RLock()
        self._opening: CheckpointFuture[None] | None = None
        self._asked: tuple[int, bool] | None = None
        self._calls, self._restoring = count(1), None
        deadline = self._options.close_deadline
        self._engine = Engine("asyncdcp-manager", drain=weakly(self.close), exit_deadline=deadline)
        self._reporter = Reporter(telemetry, self.location, self._engine)
        chain = Chain(extensions)
        keys = known_extensions(registry, extensions)
        self._session = RunSession(self._place, ranks, self._reporter, retention, takeover_seconds, keys)
        self._session.chain = chain
        self._mirror = None
        if mirror is not None and not read_only:
            kept = None if mirror_keep is None else check_retention("mirror_keep", mirror_keep)
            far = open_place(mirror)
            by_name = far is not mirror and self._place is not run  # else one location may be that of two stores
            if by_name and os.path.realpath(far.storage.info.location) == os.path.realpath(self.location):
                raise InvalidOption(f"mirror takes a second place, and {self.location} is the run's own")
            self._mirror = self._session.mirror = Mirror(self._place, far, kept, keys)
        self._saves = Saves(self._session, self._engine, self._reporter, leads=self._leads)
        self._checkpointer = AsyncCheckpointer(
            replace(self._options, on_error=self._saves.collect),
            process=process,
            process_group=ranks,
            extensions=extensions,
            registry=registry,
        )
        self._ending = Ending(self._engine, self._checkpointer._engine)
        # With read_only nobody may ask should_save, and so answer a signal.
        preempts = next((each for each in policies if isinstance(each, OnPreemption) and not read_only), None)
        self._preemption = None if preempts is None else Preemption(preempts.signals, preempts.deadline)
        self._watching: CheckpointFuture[None] | None = None
        self._decider = Decider(policies, self._preemption, ranks, self._engine, self._saves.failure_text)

    # ── opening ──

    def open(self) -> CheckpointFuture[None]:
        """Opens the run, once; every later call returns the same future."""
        with self._lock:
            self._check_open()
            if self._opening is None:
                if self._preemption is not None:
                    self._preemption.install()
                    self._watching = self._engine.submit(self._preemption.watch)
                work = self._idle if self.read_only else self._session.open
                self._opening = self._engine.submit(work, name=f"opening of {self.location}")
            return self._opening

    async def _idle(self) -> None:
        """Opening for reading claims nothing."""

    def _enter(self) -> None:
        """What every verb that writes does first."""
        self.open().result()
        if self.read_only:
            raise InvalidOption(f"this manager of {self.location} is read-only; open it without read_only=True")
        if self._alone:  # else it is for should_save and wait to say so, on all ranks
            self._surface(self._saves.failures())

    def _surface(self, failures: list[BaseException]) -> None:
        """What came up unseen. That the run is another's is raised every time."""
        if self._saves.fenced is not None:
            raise self._saves.fenced
        surface(failures, self._options.on_error)

    # ── saving ──

    def should_save(self, step: int) -> bool:
        """Whether to save at this step, which the training loop asks once a step; alike on all ranks.

        False at a step that the run's line has, or that is being saved. Blocks at most for a decision of rank 0 that
        has not come yet.
        """
        self._enter()
        check_step(step)
        if self._asked is not None and self._asked[0] == step:
            return self._asked[1] and step > self._saves.newest()
        before = self._decider.preempted
        decision = self._decider.decide(step)
        if self._decider.preempted and not before:
            self._reporter.emit("preempted", f"this process is asked to end: step {step} is the last to be saved", step)
        due = decision.save and step > self._saves.newest()
        self._asked = (step, due)
        if decision.failure is not None:
            self._surface(self._saves.failures() or [PeerFailed(f"another rank failed: {decision.failure}")])
        return due

    @property
    def preempted(self) -> bool:
        """Whether the job is asked to end: true, on all ranks, from the step on at which ``should_save`` said so."""
        return self._decider.preempted

    def save(  # noqa: PLR0913  # each is one word of the user's
        self,
        step: int,
        state: Mapping[Any, Any],
        *,
        metrics: Mapping[str, SupportsFloat] | None = None,
        metadata: Mapping[str, Any] | None = None,
        keys: Sequence[str] | None = None,
        allow_pickle: bool = False,
        on_progress: OnProgress | None = None,
    ) -> SaveHandle:
        """Begins to save ``state`` as the checkpoint of ``step``; the rest is as ``AsyncCheckpointer.save`` has it.

        Steps of a run grow: one that is not beyond the newest on the line raises ``CheckpointExists``; ``restore``
        goes back. ``metrics`` are numbers, kept with the checkpoint and in the run's history; a one-element
        tensor will do, and waits for its device. Those that are not finite are kept as None.
        """
        begun = time.monotonic()
        self._enter()
        restoring, newest = self._is_restoring(), self._saves.newest()
        if check_step(step) <= newest and not restoring:
            raise CheckpointExists(
                f"step {step} cannot be saved: the run's line has step {newest} already, and steps only grow; "
                "restore an earlier one to go back to it",
                path=self.location,
            )
        numbers: dict[str, float | None] = {}

        def stamp() -> RunStamp:
            if restoring:  # the state is none to save yet, and the line may change
                raise UsageError(f"{self.location}: a restore is under way; await it, or call result(), before a save")
            numbers.update(as_numbers(metrics))
            if self._leads and not self._session.standing.begun:
                self._engine.submit(self._session.begin, name="the beginning of a line").result()
            return RunStamp(self._session.standing.term, self._saves.parent(), numbers)

        words = SaveWords(metadata=metadata, keys=keys, allow_pickle=allow_pickle, on_progress=on_progress)
        handle = self._checkpointer._save(self._place.child(step_name(step)), state, words, stamp)
        self._decider.saved()
        self._saves.add(Called(step, numbers, time.monotonic() - begun), handle)
        if self._decider.preempted and self._preemption is not None:
            self._saves.limit(handle, (self._preemption.heard or begun) + self._preemption.patience)
        return handle

    # ── waiting ──

    def guard(self, *optimizers: torch.optim.Optimizer) -> Guard:
        """As ``AsyncCheckpointer.guard``."""
        return self._checkpointer.guard(*optimizers)

    def wait_staged(self) -> CheckpointFuture[None]:
        """As ``AsyncCheckpointer.wait_staged``."""
        return self._checkpointer.wait_staged()

    def prepare(self, state: Mapping[Any, Any]) -> CheckpointFuture[None]:
        """As ``AsyncCheckpointer.prepare``."""
        return self._checkpointer.prepare(state)

    def wait(self) -> CheckpointFuture[None]:
        """Resolves once every save that was called before is settled, history written and retention done.

        Raises what failed unseen, as ``options.on_error`` says; on all ranks, if it failed on one. On all ranks alike.
        """
        opened = self.open()
        return self._engine.submit(self._wait, opened, name=f"the saves to {self.location}")

    async def _wait(self, opened: CheckpointFuture[None]) -> None:
        async def settled() -> list[BaseException]:
            await opened
            await self._saves.settle()
            fenced = self._saves.fenced
            if self._mirror is not None and self._leads and fenced is None:
                await self._saves.copy()
            return self._saves.failures() if fenced is None else [*self._saves.failures(), fenced]

        self._surface(await self._session.tell_failures(settled))

    # ── the end ──

    def close(self) -> None:
        """Waits until pending saves are durable and what follows from them is done, and ends all threads; safe to call
        twice, and from several threads, of which each waits. Signals that were taken over are given back at its end,
        by the main thread. One that came when ``should_save`` was called no more, and that no handler was there for,
        then ends the process, as it would have at once without this; earlier only where closing takes longer than
        ``OnPreemption.deadline``.

        Raises as ``AsyncCheckpointer.close`` does, for what follows from saves, too, and what failed unseen. After it,
        verbs raise ``Closed``.
        """
        if self._engine.inherited:
            return
        try:
            self._ending.reach(self._close)
        finally:
            self._back_on_thread()

    def _close(self) -> None:
        self._decider.close()
        try:
            self._end_work()
        except DeadlineExceeded as late:
            for failure in self._saves.failures():
                late.add_note(f"and something failed that nobody looked at: {failure}")
            raise
        self._reporter.emit("closed", "closed")
        opening = self._opening
        if opening is not None and opening.unseen_failure is not None:
            self._saves.collect(opening.unseen_failure)
        self._surface(self._saves.failures())

    def _end_work(self) -> None:
        patience = 0.0  # where a signal cuts the checkpointer's close short, what follows from its saves is cut too
        try:
            self._checkpointer.close()
            patience = self._options.close_deadline
        except Exception:
            patience = self._options.close_deadline
            raise
        finally:
            if self._watching is not None:
                self._watching.cancel()
                self._watching.mark_seen()
            self._engine.close(patience)
        self._saves.check_over(patience)

    def _back_on_thread(self) -> None:
        if self._preemption is not None and self._ending.over.is_set() and not self._engine.inherited:
            self._preemption.remove()

    def __enter__(self) -> Self:
        try:
            self.open().result()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    async def __aenter__(self) -> Self:
        try:
            await self.open()
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self
