"""The verbs of a manager that read: ``restore_latest``, ``restore`` and ``load``, and those that look at the run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from asyncdcp.checkpointer import AsyncCheckpointer
from asyncdcp.checkpointer.read_verbs import OnProgress, Replicas
from asyncdcp.closing import Closing
from asyncdcp.engine import Engine
from asyncdcp.errors import Closed, InvalidOption
from asyncdcp.futures import CheckpointFuture
from asyncdcp.manager.deciding import Decider
from asyncdcp.manager.ending import Ending
from asyncdcp.manager.saves import Saves
from asyncdcp.manager.session import RunSession
from asyncdcp.pipeline.descriptions import OtherWorld
from asyncdcp.runs import Checkpoint
from asyncdcp.runs.layout import check_step
from asyncdcp.runs.listing import Mode

T = TypeVar("T")
if TYPE_CHECKING:
    from typing_extensions import TypeVar as DefaultTypeVar

    StateT = DefaultTypeVar("StateT", default=Any)
    """The type of the state that is loaded into; a new one can be anything."""
else:
    StateT = TypeVar("StateT")


class ReadVerbs(Closing):
    """What reads; none of it needs the run to be this manager's, but that restoring says where a writer goes on."""

    location: str
    read_only: bool
    _checkpointer: AsyncCheckpointer
    _engine: Engine
    _saves: Saves
    _session: RunSession
    _ending: Ending
    _decider: Decider
    _calls: Iterator[int]
    _restoring: CheckpointFuture[Checkpoint | None] | None

    @abstractmethod
    def open(self) -> CheckpointFuture[None]:
        """Opens the run, once; every later call returns the same future."""

    def restore_latest(  # noqa: PLR0913  # the vocabulary of loading
        self,
        state: Any,
        *,
        strict: bool = True,
        cast: Literal["error", "allow"] = "error",
        keys: Sequence[str] | None = None,
        rename: Mapping[str, str] | Callable[[str], str] | None = None,
        device: torch.device | str = "cpu",
        assign: bool = False,
        allow_pickle: bool = False,
        per_rank: OtherWorld = "error",
        replicas: Replicas = "read",
        on_progress: OnProgress | None = None,
    ) -> CheckpointFuture[Checkpoint | None]:
        """Loads the newest checkpoint on the line into ``state``, and resolves to it; to None where there is none yet.

        One that is damaged is taken from the ``mirror``, if that has it whole (a "fetched" event). Otherwise it is
        passed over, with an error in the log and a "fallback" event, and an older one loaded; the training then goes on
        from that. Where one is whole and only cannot be read here, that is raised
        (``KeyUnavailable``; ``UnsupportedFormat`` if an extension is missing; ``StorageUnavailable`` if a storage does
        not answer or lets nobody in). Options and the future's ``report`` are those of ``AsyncCheckpointer.load``. On
        all ranks alike.
        """
        load = partial(self._checkpointer.load, state=state, strict=strict, cast=cast, keys=keys, rename=rename)
        load = partial(load, device=device, assign=assign, allow_pickle=allow_pickle)
        load = partial(load, per_rank=per_rank, replicas=replicas, on_progress=on_progress)
        restored: CheckpointFuture[Checkpoint | None] = self._restore(load, None, latest=True)
        return restored

    def restore(  # noqa: PLR0913  # the vocabulary of loading
        self,
        step: int,
        state: Any,
        *,
        strict: bool = True,
        cast: Literal["error", "allow"] = "error",
        keys: Sequence[str] | None = None,
        rename: Mapping[str, str] | Callable[[str], str] | None = None,
        device: torch.device | str = "cpu",
        assign: bool = False,
        allow_pickle: bool = False,
        per_rank: OtherWorld = "error",
        replicas: Replicas = "read",
        on_progress: OnProgress | None = None,
    ) -> CheckpointFuture[Checkpoint]:
        """Loads the checkpoint of ``step`` into ``state``, and resolves to it; ``CheckpointNotFound`` otherwise. One
        that is damaged, or deleted, is fetched from the ``mirror``, if that has it on the run's line.

        For a writer this is a rollback: from now on the line goes on from that step, and those beyond it, which stay
        where they are, do not count any more and may be saved again.
        """
        load = partial(self._checkpointer.load, state=state, strict=strict, cast=cast, keys=keys, rename=rename)
        load = partial(load, device=device, assign=assign, allow_pickle=allow_pickle)
        load = partial(load, per_rank=per_rank, replicas=replicas, on_progress=on_progress)
        restored: CheckpointFuture[Checkpoint] = self._restore(load, step, latest=False)
        return restored

    def _restore(self, load: partial[CheckpointFuture[Any]], step: int | None, *, latest: bool) -> Any:
        self._check_open()
        self._decider.begin_anew()
        with self._called() as number:
            if load.keywords.get("state") is None:
                raise InvalidOption("restore takes the state to restore into, such as {'model': model}")
            if not latest:
                check_step(step)
            opened = self.open()
            name = f"restore from {self.location}"
            self._restoring = self._engine.submit(self._restored, number, step, load, opened, name=name)
            return self._restoring

    def _is_restoring(self) -> bool:
        return self._restoring is not None and not self._restoring.done()

    @contextmanager
    def _called(self) -> Iterator[int]:
        """The number of a call that all ranks make. One that this rank refuses is refused to the others, too, who would
        wait for it.
        """
        number = next(self._calls)
        try:
            yield number
        except InvalidOption as error:
            self._engine.submit(self._session.refuse, number, error)
            raise

    async def _restored(
        self, number: int, step: int | None, load: partial[CheckpointFuture[Any]], opened: CheckpointFuture[None]
    ) -> Checkpoint | None:
        async def ready() -> None:
            await opened
            await self._saves.settle()

        return await self._session.restore(number, step, load, ready, writes=not self.read_only)

    def load(  # noqa: PLR0913  # the vocabulary of loading
        self,
        checkpoint: int | Checkpoint,
        state: StateT | None = None,
        *,
        strict: bool = True,
        cast: Literal["error", "allow"] = "error",
        keys: Sequence[str] | None = None,
        rename: Mapping[str, str] | Callable[[str], str] | None = None,
        device: torch.device | str = "cpu",
        assign: bool = False,
        allow_pickle: bool = False,
        per_rank: OtherWorld = "error",
        replicas: Replicas = "read",
        on_progress: OnProgress | None = None,
    ) -> CheckpointFuture[StateT]:
        """Loads a step, or a checkpoint of ``checkpoints``, into ``state`` or as a new state, and resolves to that.

        Unlike ``restore`` this changes nothing about the run. Several ranks load together, as by
        ``AsyncCheckpointer.load``; one that reads by itself does so by a manager of its own, with ``read_only=True``
        and ``process_group=SoleRank()``. ``CheckpointNotFound``; ``CheckpointGone`` if it is deleted meanwhile.
        """
        self._check_open()
        load = partial(self._checkpointer.load, state=state, strict=strict, cast=cast, keys=keys, rename=rename)
        load = partial(load, device=device, assign=assign, allow_pickle=allow_pickle)
        load = partial(load, per_rank=per_rank, replicas=replicas, on_progress=on_progress)
        with self._called() as number:
            if not isinstance(checkpoint, Checkpoint):
                check_step(checkpoint)
            return self._engine.submit(self._session.load, number, checkpoint, load, name=f"load from {self.location}")

    def checkpoints(self) -> CheckpointFuture[list[Checkpoint]]:
        """The checkpoints on the line, oldest first, as this rank sees the storage now."""
        return self._look(self._session.good)

    def steps(self) -> CheckpointFuture[list[int]]:
        """The steps of ``checkpoints``."""
        return self._look(self._session.steps)

    def latest(self) -> CheckpointFuture[Checkpoint | None]:
        """The newest of them; None where there is none."""
        return self._look(self._session.latest)

    def best(self, metric: str, mode: Mode = "min") -> CheckpointFuture[Checkpoint | None]:
        """The one whose ``metric`` is the least, or with ``mode="max"`` the greatest; None where none has it."""
        return self._look(partial(self._session.best, metric, mode))

    def _look(self, work: Callable[[], Awaitable[T]]) -> CheckpointFuture[T]:
        self._check_open()
        return self._engine.submit(work, name=f"look at {self.location}")

    def _check_open(self) -> None:
        self._engine.check_process()
        if self._ending.begun:
            raise Closed("the manager is closed")
