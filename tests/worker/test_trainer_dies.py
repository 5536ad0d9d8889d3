"""The trainer is killed (SIGKILL), at many points: what was staged is committed, what was not is nothing."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncdcp import AsyncCheckpointer
from asyncdcp.envelope import encode_record
from asyncdcp.errors import CheckpointNotFound
from asyncdcp.metadata import Record
from asyncdcp.names import record_save_id
from tests.worker.conftest import LONG, Trainers, has_ended, state

pytestmark = pytest.mark.filterwarnings("ignore::asyncdcp.errors.VolatileStorageWarning")

Closing = Callable[[int], int]


@pytest.fixture
def reader() -> Any:
    with AsyncCheckpointer(process=False) as made:
        yield made


def loaded(reader: AsyncCheckpointer, path: Path) -> int | None:
    """The number of the state at ``path``, whole; None if there is none."""
    try:
        found = reader.load(path).result(LONG)
    except CheckpointNotFound:
        return None
    assert torch.equal(found["w"], state(found["number"])["w"])
    return int(found["number"])


def no_leftovers(path: Path) -> bool:
    """Only whole saves: no temporaries, and no data that no Record explains."""
    names = os.listdir(path) if path.exists() else []
    records = {record_save_id(name) for name in names}
    return not [name for name in names if name.startswith(".") or name[:20] not in records]


def kill(trainers: Trainers, closing: Closing, **order: Any) -> dict[str, Any]:
    """Carries out an order that ends with the trainer's death; returns when the worker has ended, too, by itself."""
    worker = closing(trainers.begin(**order))
    said = trainers.go()
    assert said["signal"] == signal.SIGKILL, said
    assert has_ended(worker), "the worker lives on"
    return said


def test_staged_is_committed(trainers: Trainers, closing: Closing, reader: AsyncCheckpointer, folder: Path) -> None:
    for number in range(5):
        kill(trainers, closing, path=str(folder), number=number, kill_when_staged=True)
        assert loaded(reader, folder) == number
        assert no_leftovers(folder)


@pytest.mark.parametrize("slab", [1, 2, 3])
@pytest.mark.parametrize("staging_bytes", [None, 8 << 20])
def test_not_staged_is_aborted(
    trainers: Trainers,
    closing: Closing,
    reader: AsyncCheckpointer,
    folder: Path,
    slab: int,
    staging_bytes: int | None,
) -> None:
    options = {} if staging_bytes is None else {"staging_bytes": staging_bytes}
    said = kill(trainers, closing, path=str(folder / "new"), number=1, kill_at_slab=slab, options=options)
    assert "staged" not in said
    assert loaded(reader, folder / "new") is None
    assert no_leftovers(folder / "new")


@pytest.mark.parametrize("hold", [False, True], ids=["while it stages", "when it has staged"])
def test_at_every_call_that_the_worker_makes(
    trainers: Trainers, closing: Closing, reader: AsyncCheckpointer, folder: Path, hold: bool
) -> None:
    """At every second one, that is. ``hold`` stops the worker until the state is staged, so that the trainer dies after
    that wherever it dies.
    """
    old = folder / "old"
    kill(trainers, closing, path=str(old), number=0, kill_when_staged=True)
    for point in itertools.count(1, 2):
        path = folder / str(point)
        shutil.copytree(old, path, copy_function=os.link)
        fault = {"operation": "any", "number": point, "action": "kill-trainer"}
        said = kill(trainers, closing, path=str(path), number=point, faults=[fault], hold=hold)
        found = loaded(reader, path)
        assert found in (0, point), "neither the old one nor the new one"
        assert found == point or not (hold or said.get("staged")), "it was staged, and is lost"
        assert no_leftovers(path)
        shutil.rmtree(path)
        if said.get("committed"):
            break
    assert point > 20


def test_who_waits_for_a_peer_of_a_killed_job_holds_no_copy_of_the_state(
    trainers: Trainers, closing: Closing, folder: Path
) -> None:
    worker = closing(trainers.begin(path=str(folder), number=1, peer=True, kill_when_staged=True))
    assert trainers.go()["signal"] == signal.SIGKILL
    maps = Path(f"/proc/{trainers.worker}/maps")
    until = time.monotonic() + LONG
    while not (index := list(folder.glob("*-0.index.json"))) or "asyncdcp-arena" in maps.read_text():
        assert time.monotonic() < until
    assert not has_ended(worker, 0), "its part is written, and another one's may still come"
    abort = Record(index[0].name[:20], "abort", time.time(), 2, {}, cause="the run was opened again")
    (folder / f"{abort.save_id}.json").write_bytes(encode_record(abort))
    assert has_ended(worker)


def test_a_forked_child_that_holds_the_socket_does_not_hold_the_worker(
    trainers: Trainers, closing: Closing, reader: AsyncCheckpointer, folder: Path
) -> None:
    worker = closing(trainers.begin(path=str(folder), number=1, c_fork=True, kill_when_staged=True))
    said = trainers.go()
    child = closing(os.pidfd_open(said["child"]))
    try:
        assert has_ended(worker)
        assert not has_ended(child, 0)
        assert loaded(reader, folder) == 1
    finally:
        os.kill(said["child"], signal.SIGKILL)
