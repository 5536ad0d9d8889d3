"""A trainer without torch, for tests that kill it: it saves by the real background process, over and over.

The processes are forked from one that has everything imported, so that a kill costs milliseconds. What it says goes
through a pipe, a line each: ``worker PID``, ``begun N``, ``staged N``, ``saved N``, ``failed N``.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from pathlib import Path
from typing import Final
from unittest.mock import patch

from asyncdcp.arena import Arena
from asyncdcp.config import Options
from asyncdcp.errors import AsyncDCPError
from asyncdcp.names import make_save_id
from asyncdcp.pipeline.messages import SlabReady
from asyncdcp.pipeline.session import SessionRequest
from asyncdcp.storage import LocalStorage
from asyncdcp.trace import Trace
from asyncdcp.worker import process
from asyncdcp.worker.launch import Launched
from asyncdcp.worker.main import SOCKET_FD, TRAINER_FD, main
from asyncdcp.worker.pipeline import ProcessPipeline
from tests.pipeline.forge import SLAB, images_of, job_of, parts_of, plan_of
from tests.reliability.worlds import state, structure

_HIGH: Final = 64


def fork_worker() -> Launched:
    """As ``worker.launch.launch``, without a new interpreter."""
    ours, theirs = socket.socketpair()
    trainer = os.pidfd_open(os.getpid())
    stderr = os.memfd_create("stderr", os.MFD_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.dup2(theirs.fileno(), _HIGH)
        os.dup2(trainer, _HIGH + 1)
        os.dup2(_HIGH, SOCKET_FD)
        os.dup2(_HIGH + 1, TRAINER_FD)
        main()
    theirs.close()
    os.close(trainer)
    return Launched(pid, os.pidfd_open(pid), ours, stderr)


class Trainer:
    """Saves versions ``first``, ``first + 1``, … over each other at ``path``, until it is killed."""

    def __init__(self, path: Path, first: int, run_id: str, say: int) -> None:
        self._path = path
        self._version = first
        self._run_id = run_id
        self._say = say
        self._pipeline = ProcessPipeline(Options(save_deadline=20, settle_seconds=4))
        self._plan = plan_of(structure(0, 1))
        self._arena = Arena(len(self._plan.slabs), SLAB)

    def run(self) -> None:
        """Never returns by itself."""
        with patch.object(process, "launch", fork_worker):
            asyncio.run(self._run())

    async def _run(self) -> None:
        while True:
            try:
                worker = await self._pipeline.acquire()
                self._tell("worker", worker.pid)
                await self._save()
            except AsyncDCPError:
                self._tell("failed", self._version)
                self._arena = Arena(len(self._plan.slabs), SLAB)
            else:
                self._tell("saved", self._version)
            self._version += 1

    def _tell(self, word: str, number: int) -> None:
        os.write(self._say, f"{word} {number}\n".encode())

    async def _save(self) -> None:
        save_id = make_save_id(self._run_id, "here", self._version)
        job = job_of(self._plan, save_id=save_id, overwrite=True, deadline=20.0)
        request = SessionRequest(job, LocalStorage(self._path), self._arena, lambda _slot: None, Trace())
        session = self._pipeline.open(request)
        self._tell("begun", self._version)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(session.run())
            image = images_of(self._plan, parts_of(self._plan, state(self._version)))
            for slot, slab in enumerate(self._plan.slabs):
                data = image[slab.file][slab.begin : slab.begin + slab.length]
                self._arena.slot(slot)[: len(data)] = data
                await session.announce(SlabReady(slab.file, slab.begin // SLAB, slot, slab.length))
            await session.staging_done()
            if not running.done():
                self._tell("staged", self._version)


def fork_trainer(path: Path, first: int) -> tuple[int, int]:
    """Starts one; its pid, and where what it says can be read."""
    listen, say = os.pipe()
    run_id = f"{os.getpid()} {time.monotonic_ns()}"
    pid = os.fork()
    if pid == 0:
        try:
            os.close(listen)
            Trainer(path, first, run_id, say).run()
        finally:
            os._exit(1)
    os.close(say)
    return pid, listen
