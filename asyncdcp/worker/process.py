"""CheckpointProcess: one background process as the trainer sees it, from its start to its confirmed death."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
from contextlib import suppress
from typing import Final, Protocol
from weakref import WeakSet

import anyio

from asyncdcp.arena import Arena
from asyncdcp.config import Options
from asyncdcp.errors import WorkerCrashed
from asyncdcp.worker.connection import Connection
from asyncdcp.worker.launch import Launched, launch
from asyncdcp.worker.protocol import (
    VERSION,
    Begin,
    Configure,
    Done,
    DropArena,
    Failed,
    Freed,
    Inspect,
    Inspection,
    Leave,
    Logged,
    ProtocolError,
    Ready,
    ShareArena,
    Spans,
    ToTrainer,
    ToWorker,
    WorkerEvent,
    WorkerState,
    worker_machine,
)

_KILL_SECONDS: Final = 1.0
_LAST_WORDS_BYTES: Final = 16 << 10

_logger = logging.getLogger("asyncdcp")


class SaveListener(Protocol):
    """What a process tells of one save. Called on the loop."""

    def on_message(self, message: Freed | Spans | Done | Failed) -> None:
        """The worker said something about the save."""
        ...

    def on_death(self) -> None:
        """The process is dead: nothing of it runs or holds memory any more. Called once, unless it has answered."""
        ...


class CheckpointProcess:
    """A background process that carries out saves. Lives on one asyncio loop.

    Guaranteed: ``died`` is set only when the system says that the process has ended, all threads of it, and so does
    within moments; every listener hears either an answer or of the death. In a process made by ``os.fork()`` socket,
    pidfd and arenas are closed, and the object is of no use.
    """

    def __init__(self, launched: Launched) -> None:
        self.pid = launched.pid
        self.died = anyio.Event()
        self.signal: int | None = None
        """The signal that ended it, once it died; None if it exited by itself, or that cannot be told."""
        self._pidfd = launched.pidfd
        self._stderr = launched.stderr
        self._last_words = ""
        self._machine = worker_machine()
        self._listeners: dict[str, SaveListener] = {}
        self._arenas: dict[Arena, int] = {}
        self._next_arena = 0
        self._changed = anyio.Event()
        self._inspections: list[Inspection] = []
        self._loop = asyncio.get_running_loop()
        self._connection: Connection[ToTrainer] = Connection(launched.sock, ToTrainer, self._on_message, self._on_end)
        self._loop.add_reader(self._pidfd, self._on_exit)
        _inherited.add(self)

    @classmethod
    async def start(cls, options: Options) -> CheckpointProcess:
        """Starts one, and returns it when it is ready. ``WorkerCrashed`` if it is not within
        ``options.worker_start_deadline``; it is killed then.
        """
        process = cls._watched(launch())
        try:
            affinity = None if options.worker_affinity is None else sorted(options.worker_affinity)
            level = _logger.getEffectiveLevel()
            process.post(Configure(VERSION, options.worker_nice, options.worker_io_priority, affinity, level))
            with anyio.move_on_after(options.worker_start_deadline):
                while process._machine.state is WorkerState.STARTING:
                    await process._changed.wait()
            if process._machine.state is not WorkerState.READY:
                raise process._not_started(options.worker_start_deadline)
        except BaseException:
            process.kill()
            try:
                with anyio.CancelScope(shield=True):
                    await process.wait_dead(_KILL_SECONDS)
            finally:  # a shield is none against a task's own cancel()
                process.leave_behind()
            raise
        process._drop_stderr()
        return process

    @classmethod
    def _watched(cls, launched: Launched) -> CheckpointProcess:
        try:
            return cls(launched)
        except OSError as error:
            asyncio.get_running_loop().remove_reader(launched.sock)
            launched.close()
            raise WorkerCrashed(f"the background process could not be watched: {error}") from error

    def _not_started(self, deadline: float) -> WorkerCrashed:
        self._drop_stderr()
        said = self._last_words
        what = "ended as it started" if self.died.is_set() else f"was not ready within {deadline:g} s"
        return WorkerCrashed(f"the background process {what}{': ' if said else ''}{said}", signal=self.signal)

    # ── saves ──

    @property
    def usable(self) -> bool:
        """Whether it takes a save. Looks at the system, so that one that has just died is not used."""
        if self._machine.state is WorkerState.READY and self._pidfd >= 0 and _is_readable(self._pidfd):
            self._on_exit()
        return self._machine.state is WorkerState.READY and self._pidfd >= 0

    @property
    def condemned(self) -> bool:
        """Whether it was killed and its death is not seen yet: it may never say a word again."""
        return self._machine.state is WorkerState.KILLED

    def begin(self, message: Begin, arena: Arena, listener: SaveListener) -> None:
        """Hands a save over; ``message.arena`` is filled in. The arena is shared with its first save. OSError, and the
        worker knows nothing of the save, where this process has no descriptor left to share it by.
        """
        self.drop_closed_arenas()
        number = self._arenas.get(arena)
        if number is None:
            number = self._next_arena
            self.post(ShareArena(number, arena.slots, arena.slot_bytes), arena.fd)
            self._arenas[arena] = number  # not before: where no descriptor is left, the worker has not got it
            self._next_arena += 1
        self._listeners[message.job.save_id] = listener
        self.post(Begin(number, message.storage, message.job, message.extensions))

    def drop_closed_arenas(self) -> None:
        """Lets the worker unmap the arenas that the trainer has closed."""
        for arena in [arena for arena in self._arenas if arena.closed]:
            self.post(DropArena(self._arenas.pop(arena)))

    def post(self, message: ToWorker, fd: int | None = None) -> None:
        """Sends a message; nothing happens where the process is gone already."""
        self._connection.post(message, fd)

    async def flushed(self) -> None:
        """Returns when the kernel holds all that was posted: what it holds the worker gets, whatever becomes of this
        process.
        """
        await self._connection.flushed()

    def forget(self, save: str) -> None:
        """The listener does not listen any more."""
        self._listeners.pop(save, None)

    async def inspect(self) -> Inspection:
        """The worker about itself: how it is, and that it is. ``WorkerCrashed`` if it has ended."""
        known = len(self._inspections)
        self.post(Inspect())
        while len(self._inspections) == known:
            if self.died.is_set():
                raise WorkerCrashed("the background process has ended", signal=self.signal)
            await self._changed.wait()
        return self._inspections.pop()

    # ── what it says ──

    def _on_message(self, message: ToTrainer) -> None:
        match message:
            case Freed(save) | Spans(save):
                if save in self._listeners:
                    self._listeners[save].on_message(message)
            case Done(save) | Failed(save):
                listener = self._listeners.pop(save, None)
                if listener is not None:
                    listener.on_message(message)
            case Logged():
                _log(message)
            case Ready():
                self._ready(message)
            case Inspection():
                self._inspections.append(message)
                self._tell()

    def _ready(self, message: Ready) -> None:
        if message.version != VERSION:
            raise ProtocolError(f"the worker speaks version {message.version}, not {VERSION}")
        self._machine.on(WorkerEvent.READY)
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    # ── its end ──

    def _on_end(self, error: Exception | None) -> None:
        """It closed the socket, or cannot be understood: no more of it is to be had, so it has to die."""
        if error is not None:
            _logger.error("the background process cannot be understood any more", exc_info=error)
        if self._machine.state is not WorkerState.LEAVING:
            self.kill()

    def kill(self) -> None:
        """SIGKILL. Its death is seen later, at ``died``; a process in an uninterruptible wait may take its time."""
        if self._machine.state is not WorkerState.DEAD:
            self._machine.on(WorkerEvent.KILL)
            with suppress(ProcessLookupError):
                self._send_kill()

    def _send_kill(self) -> None:
        if self._pidfd >= 0:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def wait_dead(self, seconds: float) -> bool:
        """Whether it has died, within ``seconds``."""
        with anyio.move_on_after(seconds):
            await self.died.wait()
        return self.died.is_set()

    def _on_exit(self) -> None:
        """The system says it has ended. What it said before is heard first."""
        if self._machine.state is WorkerState.DEAD:
            return
        self._loop.remove_reader(self._pidfd)
        self._machine.on(WorkerEvent.DIED)
        self.signal = _reap(self._pidfd)
        self._connection.read_all()
        self._release()
        self.died.set()
        self._tell()
        listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            listener.on_death()

    async def aclose(self, seconds: float) -> bool:
        """Asks it to leave once its saves are settled, kills it ``seconds`` from now; whether it is dead."""
        if self._machine.state is WorkerState.READY:
            self._machine.on(WorkerEvent.LEAVE)
            self.post(Leave())
        if await self.wait_dead(seconds):
            return True
        _logger.warning("the background process %d did not leave within %g s, and is killed", self.pid, seconds)
        self.kill()
        return await self.wait_dead(_KILL_SECONDS)

    def leave_behind(self) -> None:
        """Closes what is open here, of a process that does not die. It finds its trainer gone when it wakes."""
        if self._machine.state is not WorkerState.DEAD and self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            self._release()

    def _release(self) -> None:
        self._connection.close()
        self._drop_stderr()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _drop_stderr(self) -> None:
        """Closes it, and keeps the end of what was written to it."""
        if self._stderr >= 0:
            size = os.fstat(self._stderr).st_size
            said = os.pread(self._stderr, _LAST_WORDS_BYTES, max(size - _LAST_WORDS_BYTES, 0))
            self._last_words = said.decode(errors="replace").strip()
            os.close(self._stderr)
            self._stderr = -1

    def close_inherited(self) -> None:
        """In a forked child: closes descriptors, and touches nothing that is shared with the parent (its epoll)."""
        self._connection.close_inherited()
        self._drop_stderr()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        for arena in list(self._arenas):
            arena.close()


def _log(message: Logged) -> None:
    logger = logging.getLogger(message.logger)
    if logger.isEnabledFor(message.level):
        record = logger.makeRecord(
            logger.name, message.level, "(background process)", 0, "%s", (message.message,), None
        )
        record.created = message.created
        record.processName = "asyncdcp-worker"
        logger.handle(record)


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _reap(pidfd: int) -> int | None:
    """The signal that ended the child, which is reaped; None if it exited, or somebody else has reaped it."""
    try:
        status = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        return None
    killed = status is not None and status.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
    return status.si_status if status is not None and killed else None


_inherited: WeakSet[CheckpointProcess] = WeakSet()  # fork handlers are one per process, and cannot be removed


def _after_fork() -> None:
    for process in list(_inherited):
        process.close_inherited()
    _inherited.clear()


os.register_at_fork(after_in_child=_after_fork)
