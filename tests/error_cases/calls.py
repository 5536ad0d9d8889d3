"""Calls that cannot be carried out."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn

from asyncdcp import AsyncCheckpointer, MemoryStorage, Options, SyncCheckpointer
from asyncdcp.errors import AsyncDCPError
from asyncdcp.memory_limits import Headroom
from asyncdcp.pipeline.descriptions import Viewer
from asyncdcp.planning import Structure
from asyncdcp.planning.division import divide
from asyncdcp.planning.held_chunks import holdings_of
from asyncdcp.storage import MemoryPlace
from tests.error_cases.cases import case, load, managed, save


@case("call", "no checkpoint at the path")
def _not_found() -> None:
    load(MemoryStorage("run/step_9"))


@case("call", "a checkpoint is there already")
def _exists() -> None:
    storage = save({"x": 1})
    with SyncCheckpointer(process=False) as checkpointer:
        checkpointer.save(storage, {"x": 2})


@case("call", "an option that means nothing")
def _option() -> None:
    Options(when_busy="never")  # type: ignore[arg-type]  # that is the point


@case("call", "a package that an extra brings is missing")
def _missing() -> None:
    gone = ModuleNotFoundError("No module named 'obstore'")
    with (
        mock.patch("asyncdcp.storage.import_module", side_effect=gone),
        SyncCheckpointer(process=False) as checkpointer,
    ):
        checkpointer.load("s3://bucket/run/step_1")


@case("call", "keys= that is one string")
def _one_key() -> None:
    load(save({"x": 1}), keys="model.*")


@case("call", "load(rename=) without a state")
def _rename_alone() -> None:
    load(save({"x": 1}), rename={"x": "y"})


@case("call", "guard() of what has no step hook")
def _guard() -> None:
    with AsyncCheckpointer(process=False) as checkpointer:
        checkpointer.guard(nn.Linear(1, 1))  # type: ignore[arg-type]  # that is the point


@case("call", "a step that the run has, or one before")
def _old_step() -> None:
    with managed(MemoryPlace("run")) as manager:
        manager.save(9, {"x": 1}).result()
        manager.save(9, {"x": 1})


@case("call", "a step that the run does not have")
def _no_step() -> None:
    with managed(MemoryPlace("run")) as manager:
        manager.save(9, {"x": 1}).result()
        manager.restore(5, {"x": 1}).result()


@case("call", "a save by a manager that only reads")
def _read_only() -> None:
    with managed(MemoryPlace("run"), read_only=True) as manager:
        manager.save(9, {"x": 1})


@case("call", "a checkpoint in the place of a run")
def _no_run() -> None:
    place = MemoryPlace("run")
    with SyncCheckpointer(process=False) as checkpointer:
        checkpointer.save(place.storage, {"x": 1})
    with managed(place):
        pass


@case("call", "a call after close()")
def _closed() -> None:
    checkpointer = SyncCheckpointer(process=False)
    checkpointer.close()
    checkpointer.save(MemoryStorage(), {"x": 1})


@case("call", "a launched process, and no process group yet")
def _launched() -> None:
    os.environ["WORLD_SIZE"] = "4"
    try:
        SyncCheckpointer(process=False)
    finally:
        del os.environ["WORLD_SIZE"]


@case("call", "what differs by rank, and no PerRank")
def _replicas() -> None:
    divide([holdings_of(Structure((), (), {}, {}), bool, [], {"data.position": digest}) for digest in (b"1", b"2")])


@case("call", "PerRank values of another number of ranks")
def _other_world() -> None:
    index = SimpleNamespace(plan=SimpleNamespace(own=["rng.torch", "rng.python"]))
    Viewer(0, 2, "error").looks_as(4, [index], "run/step_9")  # type: ignore[list-item]  # all that it looks at


@case("call", "close() in a done callback")
def _deadlock() -> None:
    found: list[BaseException] = []
    seen = threading.Event()

    def close(_: object) -> None:
        try:
            checkpointer.close()
        except AsyncDCPError as error:
            found.append(error)
        seen.set()

    with AsyncCheckpointer(process=False) as checkpointer:
        checkpointer.save(MemoryStorage(), {"x": 1}).add_done_callback(close)
        seen.wait(30)
    raise found[0]


@case("call", "more memory than there is")
def _memory() -> None:
    with mock.patch("asyncdcp.memory_limits.tightest", lambda *_: Headroom(1 << 20, "MemAvailable")):
        save({"x": torch.zeros(1).expand(1 << 24)})
