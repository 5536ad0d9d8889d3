"""The child: takes saves from its trainer until it is asked to leave or the trainer has died, and drains them.

It is started with the socket as descriptor 3 and a pidfd of the trainer as 4. The trainer's death is seen by that
pidfd: the socket alone would not tell, since a process that the trainer forked may hold the other end open.
"""

from __future__ import annotations

import asyncio
import logging
import os
import selectors
import signal
import socket
import sys
import traceback
from typing import Final

import anyio
import anyio.lowlevel

from asyncdcp.arena import Arena
from asyncdcp.errors import plain
from asyncdcp.extensions import Chain, extension_of
from asyncdcp.storage import open_spec
from asyncdcp.worker import surroundings
from asyncdcp.worker.connection import Connection
from asyncdcp.worker.failures import to_frame
from asyncdcp.worker.job import Job
from asyncdcp.worker.protocol import (
    VERSION,
    Begin,
    Configure,
    DropArena,
    Failed,
    Inspect,
    Leave,
    Logged,
    ProtocolError,
    Ready,
    ShareArena,
    Slab,
    Staged,
    Stop,
    ToTrainer,
    ToWorker,
)

SOCKET_FD: Final = 3
TRAINER_FD: Final = 4
_LOGS_WAITING: Final = 1000
_LAST_WORDS_SECONDS: Final = 1.0


class Worker:
    """The child's whole state. Everything runs on one loop; ``run`` returns when there is nothing left to do."""

    def __init__(self, sock: socket.socket, trainer: int) -> None:
        self._trainer = trainer
        self._connection: Connection[ToWorker] = Connection(sock, ToWorker, self._on_message, self._on_end)
        self._arenas: dict[int, Arena] = {}
        self._jobs: dict[str, Job] = {}
        self._last: Job | None = None
        self._leaving = False
        self._gone = False
        self._idle = anyio.Event()
        asyncio.get_running_loop().add_reader(trainer, self._trainer_died)

    async def run(self) -> None:
        """Serves, drains, and sends its last words."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                await self._idle.wait()
        except BaseException:
            logging.getLogger("asyncdcp").exception("the background process ends by an error")
            raise
        finally:
            await anyio.lowlevel.checkpoint()  # what was logged is posted
            with anyio.move_on_after(_LAST_WORDS_SECONDS):
                await self._connection.flushed()

    def post(self, message: ToTrainer) -> None:
        """Sends a message to the trainer, if it is still there."""
        self._connection.post(message)

    # ── what the trainer says ──

    def _on_message(self, message: ToWorker) -> None:
        match message:
            case Slab() | Staged() | Stop():
                self._on_save_message(message)
            case Begin():
                self._begin(message)
            case ShareArena(number, slots, slot_bytes):
                self._arenas[number] = Arena.attach(self._connection.take_fd(), slots, slot_bytes)
            case DropArena(number):
                self._arenas.pop(number).close()
            case Configure():
                self._configure(message)
            case Inspect():
                self.post(surroundings.inspection(sorted(sys.modules), len(self._arenas), len(self._jobs)))
            case Leave():
                self._leaving = True
                self._check_idle()

    def _on_save_message(self, message: Slab | Staged | Stop) -> None:
        job = self._jobs.get(message.save)
        if job is None:  # it was settled while the message was on its way
            return
        match message:
            case Slab(_, slab):
                job.slab(slab)
            case Staged():
                job.staged()
            case Stop():
                job.stop(message)

    def _configure(self, message: Configure) -> None:
        if message.version != VERSION:
            raise ProtocolError(f"the trainer speaks version {message.version}, this worker {VERSION}")
        handler = _LogsToTrainer(self)
        logging.basicConfig(level=message.log_level, handlers=[handler], force=True)
        logging.captureWarnings(capture=True)
        surroundings.set_priorities(message)
        surroundings.detach_stderr()
        self.post(Ready(VERSION, os.getpid()))

    def _begin(self, message: Begin) -> None:
        try:
            storage = open_spec(message.storage, kill_trainer=self._kill_trainer)
            chain = Chain([extension_of(spec) for spec in message.extensions])
            job = Job(message.job, storage, self._arenas[message.arena], chain, self.post)
        except Exception as error:  # noqa: BLE001  # a save that cannot be begun is not the others' end
            self.post(Failed(message.job.save_id, to_frame(error)))
            return
        earlier, self._last = self._last, job
        self._jobs[job.id] = job
        self._tasks.create_task(self._carry_out(job, earlier))

    async def _carry_out(self, job: Job, earlier: Job | None) -> None:
        await job.run(earlier)
        del self._jobs[job.id]
        if self._last is job:
            self._last = None
        self._check_idle()

    # ── the trainer's end ──

    def _trainer_died(self) -> None:
        """What it sent before is still in the socket, and counts."""
        self._connection.read_all()
        self._end()

    def _on_end(self, error: Exception | None) -> None:
        if error is not None:
            logging.getLogger("asyncdcp").error("the trainer cannot be understood any more", exc_info=error)
        self._end()

    def _end(self) -> None:
        if self._gone:
            return
        self._gone = True
        asyncio.get_running_loop().remove_reader(self._trainer)
        jobs = list(self._jobs.values())
        for job in jobs:
            job.trainer_died()
        if jobs:
            self._tasks.create_task(self._release_arenas(jobs))
        self._check_idle()

    async def _release_arenas(self, jobs: list[Job]) -> None:
        """Nothing more is staged: the memory goes once it is written, however long a part of a peer is waited for."""
        for job in jobs:
            await job.written.wait()
        for arena in self._arenas.values():
            arena.close()

    def _check_idle(self) -> None:
        if not self._jobs and (self._leaving or self._gone):
            self._idle.set()

    def _kill_trainer(self) -> None:
        signal.pidfd_send_signal(self._trainer, signal.SIGKILL)


class _LogsToTrainer(logging.Handler):
    """Sends records to the trainer, from any thread; at most ``_LOGS_WAITING`` wait for the loop, more are dropped."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._waiting = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self._waiting >= _LOGS_WAITING or self._loop.is_closed():
            return
        self._waiting += 1
        message = Logged(record.name, record.levelno, plain(self.format(record)), record.created)
        self._loop.call_soon_threadsafe(self._post, message)

    def _post(self, message: Logged) -> None:
        self._waiting -= 1
        self._worker.post(message)


async def _serve() -> None:
    await Worker(socket.socket(fileno=SOCKET_FD), TRAINER_FD).run()


def main() -> None:
    """The whole life of the process. Ends it without the interpreter's own end: nothing of it is needed, and a thread
    that hangs in the storage must not hold the process.
    """
    surroundings.ignore_signals()
    surroundings.close_strays(TRAINER_FD + 1)
    for fd in (SOCKET_FD, TRAINER_FD):
        os.set_inheritable(fd, False)  # noqa: FBT003  # os has it so
    surroundings.name_process(b"asyncdcp-worker")
    runner = asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.EpollSelector()))
    try:
        runner.run(_serve())
    except BaseException:  # noqa: BLE001  # the trainer learns of it by the exit status; by stderr, while it starts
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
