"""Which pipeline a save runs in: the background process where everything of it can travel there, else a thread."""

from __future__ import annotations

from functools import cached_property

import anyio

from asyncdcp.config import Options
from asyncdcp.errors import Closed, ThreadPipelineWarning
from asyncdcp.extensions import Chain
from asyncdcp.pipeline.session import LocalSession, SaveSession, SessionRequest
from asyncdcp.storage import Storage, spec_of
from asyncdcp.warn import warn_caller
from asyncdcp.worker.process import CheckpointProcess
from asyncdcp.worker.session import RemoteSession


class ProcessPipeline:
    """A checkpointer's background process: started with the first save, and again after it has died."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._processes: list[CheckpointProcess] = []
        """The one in use is the last; those before it were killed and have not died yet."""
        self._start: anyio.CancelScope | None = None
        self._told: set[str] = set()
        self._closed = False

    @cached_property
    def _starting(self) -> anyio.Lock:
        """Made at its first use: that is on the engine's loop, where the pipeline itself may be made on trio's."""
        return anyio.Lock()

    @property
    def process(self) -> CheckpointProcess | None:
        """The process in use, None if there is none now."""
        last = self._processes[-1] if self._processes else None
        return last if last is not None and last.usable else None

    def open(self, request: SessionRequest) -> SaveSession:
        """The session of a save. What cannot travel runs here, on a thread of this process."""
        storage, extensions = spec_of(request.storage), request.chain.specs
        if storage is None or extensions is None:
            return LocalSession(request)
        return RemoteSession(self.acquire, request, storage, extensions, self._options.settle_seconds)

    def warn_unless_travels(self, storage: Storage, chain: Chain) -> None:
        """Says so, once for a kind of storage and once for the extensions, where saves do not run in the background
        process.
        """
        kind = type(storage).__qualname__
        if spec_of(storage) is None:
            self._warn(f"{kind} cannot be opened by the background process: saves to it run on a thread of this one")
        for name in chain.staying:
            self._warn(
                f"{name} cannot be made in the background process (it has no travel(), or its class is not at the top "
                "of an importable module): saves run on a thread of this one"
            )

    def _warn(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warn_caller(message, ThreadPipelineWarning)

    async def acquire(self) -> CheckpointProcess:
        """The process, started if there is none that lives. ``WorkerCrashed`` if that fails, ``Closed`` if ``aclose``
        was called before it was there.
        """
        async with self._starting:
            if not self._closed:
                with anyio.CancelScope() as self._start:
                    return self.process or await self._started()
            raise Closed("the checkpointer is closed")

    async def _started(self) -> CheckpointProcess:
        process = await CheckpointProcess.start(self._options)
        self._processes = [old for old in self._processes if not old.died.is_set()]
        self._processes.append(process)
        return process

    async def start(self) -> None:
        """Starts the process ahead of the first save."""
        await self.acquire()

    def tidy(self) -> None:
        """After a save: memory that the trainer has given back is given back there, too."""
        if self._processes and not self._processes[-1].died.is_set():
            self._processes[-1].drop_closed_arenas()

    async def aclose(self) -> None:
        """Ends the process: at once if it has nothing to do or is still starting, within about half of
        ``settle_seconds`` in any case.
        """
        self._closed = True
        if self._start is not None:
            self._start.cancel()
        try:
            async with self._starting:  # so that one that has just started is among them
                pass
            for process in self._processes:
                await process.aclose(self._options.settle_seconds / 2)
        finally:
            for process in self._processes:
                process.leave_behind()
