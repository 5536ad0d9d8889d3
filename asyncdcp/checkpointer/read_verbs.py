"""The verbs of a checkpointer that read, ``load`` and ``verify``: one future each, cancellation and a deadline."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Generic, Literal, TypeAlias, TypeVar, overload

import anyio
import torch

from asyncdcp.checkpointer.handles import PendingSaves
from asyncdcp.checkpointer.loading import LoadRequest, load_state, refuse_load
from asyncdcp.closing import Closing
from asyncdcp.config import Options
from asyncdcp.engine import Engine
from asyncdcp.errors import AsyncDCPError, Cancelled, Closed, DeadlineExceeded, InvalidOption, foreign_error, reading
from asyncdcp.extensions import ExtensionRegistry
from asyncdcp.futures import CheckpointFuture
from asyncdcp.pipeline.descriptions import OtherWorld
from asyncdcp.pipeline.verify import verify
from asyncdcp.ranks import Ranks
from asyncdcp.results import PROGRESS_STAGES, Progress, ProgressMeter, VerifyReport
from asyncdcp.state_dict.flatten import flatten
from asyncdcp.state_dict.options import LoadOptions, known_device
from asyncdcp.storage import Storage, open_storage
from asyncdcp.trace import Trace
from asyncdcp.unwinding import drop_frames

StateT = TypeVar("StateT")
T = TypeVar("T")
Place: TypeAlias = str | os.PathLike[str] | Storage
Replicas: TypeAlias = Literal["read", "broadcast"]
OnProgress: TypeAlias = Callable[[Progress], object]


class ReadTask(Generic[T]):
    """Carries ``work`` out on the engine's loop; ``future`` resolves to the first of what it returns, with the second
    at its ``report``. ``verb`` is "load" or "verify", ``hint`` more to say where it is late.
    """

    def __init__(self, verb: str, path: str, work: Callable[[], Awaitable[tuple[T, object]]], engine: Engine) -> None:
        self._what = f"{verb} of {path}"
        self._path = path
        self._work = work
        self._scope: anyio.CancelScope | None = None
        self._given_up = False
        self.future: CheckpointFuture[T] = engine.future(self._what, cancel=self._cancel)

    async def run(self, deadline: float, hint: str = "") -> None:
        """Never raises but for cancellation, at the engine's end."""
        timer = asyncio.get_running_loop().call_later(deadline, self._expire, deadline, hint)
        try:
            error = await self._carried_out()
            if error is not None:
                drop_frames(error)
                self.future.fail(error)
        finally:
            timer.cancel()
            self.future.fail(Cancelled(f"the {self._what} was cancelled", path=self._path))

    async def _carried_out(self) -> AsyncDCPError | None:
        """What the work failed by, if it did."""
        try:
            with anyio.CancelScope() as self._scope:
                if self._given_up:
                    self._scope.cancel()
                with reading(self._path):
                    value, self.future.report = await self._work()
                self.future.resolve(value)
        except AsyncDCPError as error:
            return error
        except Exception as error:  # noqa: BLE001  # it belongs to whoever awaits the future
            return foreign_error(f"the {self._what}", error, path=self._path)
        return None

    def _cancel(self) -> None:
        self._given_up = True
        if self._scope is not None:
            self._scope.cancel()

    def _expire(self, deadline: float, hint: str) -> None:
        """A read that never returns must not keep the caller: the future fails now, the read is left to end when it
        can.
        """
        message = f"the {self._what} was not done within {deadline:g} s (option load_deadline){hint}"
        self.future.fail(DeadlineExceeded(message, path=self._path))
        self._cancel()


class ReadVerbs(Closing):
    """What reads, and what every verb does first."""

    ranks: Ranks
    _options: Options
    _engine: Engine
    _registry: ExtensionRegistry
    _pending: PendingSaves
    _closed: bool

    @overload
    def load(
        self,
        path: Place,
        state: None = None,
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
    ) -> CheckpointFuture[Any]: ...

    @overload
    def load(
        self,
        path: Place,
        state: StateT,
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
    ) -> CheckpointFuture[StateT]: ...

    def load(  # noqa: PLR0913  # the vocabulary of loading; LoadOptions carries it from here on
        self,
        path: Place,
        state: Any = None,
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
    ) -> CheckpointFuture[Any]:
        """Begins to load the checkpoint at ``path``; resolves to the state, with a ``LoadReport`` at the future's
        ``report``.

        Without ``state`` a new nested state is made, of tensors on ``device``. With it, the state is what the future
        resolves to, and it must not be used until then. For modules and bare tensors and values the *state* decides:
        tensors are filled in place, values replaced. For other Statefuls (optimizers, schedulers, data loaders) the
        *checkpoint* decides: tensors that match are filled in place, others made anew. Every Stateful's
        ``load_state_dict`` is called, in the state's order, after every byte was verified. Tensors that show the same
        memory in the same way are one; others that overlap are filled in no order.

        All that is missing, unexpected or different is found and listed (``StateMismatch``) before a byte is read. A
        load into ``state`` begins once the saves that were called before it have copied their tensors.

        - ``strict=False`` loads what both sides have and leaves the rest alone; the report's ``missing`` and
          ``unexpected`` say what that is. A tied tensor is missing only where all of its names are.
        - ``cast="allow"`` converts to the target's dtype where it differs.
        - ``keys`` are globs of the checkpoint's FQNs: only these are loaded; the rest of the state is left alone.
          Strictly, a glob that matches nothing is a mismatch, and so is what the state has by such a name and the
          checkpoint lacks, as far as a function for ``rename`` lets that be told. A Stateful of which they choose a
          part only gets no entries that it does not have yet.
        - ``rename`` maps the checkpoint's FQNs, or dotted prefixes of them ("" is all), to the state's, or is a
          function that does, and must not give one name to two; names that differ only by what wrappers add
          (``module.``, ``_orig_mod.``, activation checkpointing) match by themselves.
        - ``assign=True`` replaces the tensors of modules and of containers by new ones, which modules on the meta
          device need; new ones are where the old ones were, or on ``device`` for meta.
        - ``allow_pickle=True`` also unpickles what was saved so: it runs code of the checkpoint's choosing.
        - ``per_rank`` says what a rank gets of ``PerRank`` values that were saved by another number of ranks: an error,
          rank 0's, or with "drop" nothing, so that what it has stays.
        - ``replicas="broadcast"`` has what several ranks want alike read by one of them, each a part, and sent to the
          others over the network, for a storage that is slower than that; by default each reads all it wants. All ranks
          give the same.

        Several ranks load together: all of them call it, all get the same checkpoint, each reads what it holds, and if
        one of them fails, all do, before any ``load_state_dict`` is called.

        ``ChecksumMismatch`` names file, block and tensors; targets may then be partly written. Also
        ``CheckpointNotFound``, ``AmbiguousCheckpoint``, ``CorruptCheckpoint``, ``UnsupportedFormat``, ``StorageError``,
        ``DeadlineExceeded``, ``Cancelled``.

        >>> with asyncdcp.SyncCheckpointer(process=False) as checkpointer:
        ...     _ = checkpointer.save("trained", {"net": torch.nn.Linear(2, 1), "step": 7})
        ...     model = torch.nn.Linear(2, 1)
        ...     _ = checkpointer.load("trained", {"model": model}, keys=["net.*"], rename={"net": "model"})
        ...     print(checkpointer.load("trained", keys=["step"]))
        {'step': 7}
        """
        storage = open_storage(path)
        with self._telling_peers(storage.info.location):
            self._enter()
            options = LoadOptions(
                strict=strict,
                cast=cast,
                keys=keys,
                rename=rename,
                device=known_device(device),
                assign=assign,
                allow_pickle=allow_pickle,
                per_rank=per_rank,
                replicas=replicas,
            )
            if state is None and rename is not None:
                raise InvalidOption(
                    "rename pairs the checkpoint's names with those of a state; give load the state, too"
                )
            flat = None if state is None else flatten(state, allow_pickle=allow_pickle, allow_meta=True)
            staged = None if state is None else self._pending.all_staged(self._engine)
            request = LoadRequest(
                storage,
                state,
                flat,
                options,
                self._trace(0, on_progress),
                staged,
                self.ranks,
                self._options.load_deadline,
                self._registry,
            )
        hint = "; tensors loaded in place may still be written to"
        return self._read("load", storage, partial(load_state, request), hint)

    @contextmanager
    def _telling_peers(self, location: str) -> Iterator[None]:
        """A load that this rank refuses at the call is refused to the others, too, who would wait for it."""
        try:
            yield
        except Exception as error:  # what a state_dict raises, too
            if self.ranks.world_size > 1:
                what = f"the load from {location}"
                known = error if isinstance(error, AsyncDCPError) else foreign_error(what, error, path=location)
                with suppress(Closed):
                    self._engine.submit(refuse_load, self.ranks, location, known)
            raise

    def _read(
        self, verb: str, storage: Storage, work: Callable[[], Awaitable[tuple[T, object]]], hint: str = ""
    ) -> CheckpointFuture[T]:
        location = storage.info.location
        task = ReadTask(verb, location, work, self._engine)
        self._engine.submit(partial(task.run, self._options.load_deadline, hint), name=f"{verb} of {location}")
        return task.future

    def verify(self, path: Place, *, on_progress: OnProgress | None = None) -> CheckpointFuture[VerifyReport]:
        """Begins to read every byte of the checkpoint at ``path`` and to hold it against its checksums.

        Damage is not raised: the report lists all of it, by file, block and tensors; ``report.ok`` says that there is
        none. No extension is needed, and no key unless names and values are encrypted too. Raises
        ``CheckpointNotFound``, ``AmbiguousCheckpoint``, ``UnsupportedFormat``, ``StorageError``, ``DeadlineExceeded``
        (by ``options.load_deadline``), ``Cancelled``.

        >>> with asyncdcp.SyncCheckpointer(process=False) as checkpointer:
        ...     _ = checkpointer.save("whole", {"weight": torch.ones(3)})
        ...     report = checkpointer.verify("whole")
        >>> report.ok, report.files, report.damages
        (True, 1, ())
        """
        self._enter()
        storage = open_storage(path)
        trace = self._trace(0, on_progress)

        async def work() -> tuple[VerifyReport, None]:
            return await verify(storage, trace, self._registry), None

        return self._read("verify", storage, work)

    def _trace(self, total: int, on_progress: OnProgress | None) -> Trace:
        meter = None
        if not (on_progress is None or callable(on_progress)):
            raise InvalidOption(f"on_progress takes a function of a Progress, not {on_progress!r:.80}")
        if on_progress is not None:  # a stage a callback: one stage's reports never replace another's
            meter = ProgressMeter({stage: self._engine.callback(on_progress) for stage in PROGRESS_STAGES})
        trace = Trace(meter)
        trace.total = total
        return trace

    def _check_open(self) -> None:
        self._engine.check_process()  # first of all: in a forked child a lock may be held for good
        if self._closed:
            raise Closed("the checkpointer is closed")

    def _enter(self) -> None:
        """What every verb does first."""
        self._check_open()
        self._pending.surface()
