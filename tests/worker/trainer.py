"""A program that forks trainers by order: one JSON line in for each, JSON lines out. See ``conftest.Trainers``."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

import torch

from asyncdcp import AsyncCheckpointer, Options, SoleRank
from asyncdcp.ranks import Decide
from asyncdcp.staging import SlabCopier
from asyncdcp.storage import Storage, open_storage
from asyncdcp.storage.faults import FaultyStorage
from asyncdcp.storage.spec import Fault
from asyncdcp.worker.pipeline import ProcessPipeline

SLAB = 8 << 20


def hear() -> dict[str, Any] | None:
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return None
        line += byte
    heard: dict[str, Any] = json.loads(line)
    return heard


def say(**message: Any) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


class Deserted(SoleRank):
    """Rank 0 of two, of which the other agrees to everything."""

    world_size = 2

    async def decide(self, topic: str, told: bytes, decide: Decide, *, deadline: float | None = None) -> bytes:
        return decide([told, told])


def train(order: dict[str, Any]) -> None:
    """Saves state ``order["number"]``; ``kill_at_slab`` ends the trainer by SIGKILL before that slab is copied, and
    ``kill_when_staged`` at once when the state is staged. ``c_fork`` leaves a child that holds all descriptors;
    ``hold`` stops the worker until the state is staged. ``peer`` is for one more rank, which never writes its part.
    """
    ranks = Deserted() if order.get("peer") else None
    checkpointer = AsyncCheckpointer(Options(**order.get("options", {})), process=True, process_group=ranks)
    pipeline = checkpointer._lanes.pipeline
    assert isinstance(pipeline, ProcessPipeline)
    worker = checkpointer._engine.submit(pipeline.acquire).result(150).pid
    say(worker=worker)
    if order.get("c_fork"):
        child = ctypes.PyDLL(None).fork()  # as a library would: no handler of Python runs
        if child == 0:
            signal.pause()
        say(child=child)
    hear()
    state = {"w": torch.full((3 * SLAB // 8 - 5000,), order["number"], dtype=torch.int64), "number": order["number"]}
    if "kill_at_slab" in order:
        kill_at_slab(order["kill_at_slab"])
    storage: Storage = open_storage(order["path"])
    if "faults" in order:
        storage = FaultyStorage(order["path"], [Fault(**fault) for fault in order["faults"]])
    if order.get("hold"):
        os.kill(worker, signal.SIGSTOP)
    handle = checkpointer.save(storage, state, overwrite=True)
    handle.staged.result(150)
    if order.get("hold"):
        os.kill(worker, signal.SIGCONT)
    if order.get("kill_when_staged"):
        os.kill(os.getpid(), signal.SIGKILL)
    say(staged=True)
    handle.result(150)
    say(committed=True)
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_slab(number: int) -> None:
    copied, copy = [0], SlabCopier.copy

    def counted(*args: Any) -> None:
        copied[0] += 1
        if copied[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        copy(*args)

    SlabCopier.copy = counted  # type: ignore[method-assign, assignment]


def main() -> None:
    while (order := hear()) is not None:
        pid = os.fork()
        if pid == 0:
            try:
                train(order)
            except BaseException as error:
                say(error=repr(error))
                raise
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        say(signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
    sys.exit()
