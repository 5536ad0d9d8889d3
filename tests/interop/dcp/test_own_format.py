"""asyncdcp's own checkpoints, loaded by ``dcp.load`` through the drop-in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from asyncdcp import SyncCheckpointer
from asyncdcp.errors import ChecksumMismatch, UnsupportedValue
from asyncdcp.interop.dcp import FileSystemReader
from tests.interop.dcp.states import State, blank, shard

Same = Callable[[Any, Any], bool]


@pytest.fixture
def checkpointer() -> Iterator[SyncCheckpointer]:
    with SyncCheckpointer(process=False) as made:
        yield made


def test_all_of_a_state(tmp_path: Path, state: State, same: Same, checkpointer: SyncCheckpointer) -> None:
    checkpointer.save(tmp_path, state)
    target = blank(state)
    dcp.load(target, storage_reader=FileSystemReader(tmp_path))
    assert same(target, state)
    made: State = {}
    planner = _EmptyStateDictLoadPlanner()
    _load_state_dict(made, FileSystemReader(tmp_path), planner=planner, no_dist=True)
    assert torch.equal(made["optimizer"]["state"]["0"]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])
    assert made["progress"] == state["progress"] and torch.equal(made["averages"][0], torch.ones(3))


def test_modules_ties_and_parts(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    model = torch.nn.Linear(70, 50)
    checkpointer.save(tmp_path, {"model": model, "tied": model.weight})
    other, rows = torch.nn.Linear(70, 50), torch.zeros(11, 70)
    target = {"model": other, "tied": shard(rows, (20, 0), (50, 70))}
    dcp.load(target, storage_reader=FileSystemReader(tmp_path))
    assert torch.equal(other.weight, model.weight) and torch.equal(rows, model.weight[20:31])


class Odd:
    """What takes allow_pickle."""


def test_pickles_and_damage_are_refused(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    checkpointer.save(tmp_path, {"x": torch.ones(100_000), "odd": {1, 2}, "pickled": Odd()}, allow_pickle=True)
    target: State = {"odd": None}
    dcp.load(target, storage_reader=FileSystemReader(tmp_path))
    assert target == {"odd": {1, 2}}
    with pytest.raises(CheckpointException) as caught:
        dcp.load({"pickled": None}, storage_reader=FileSystemReader(tmp_path))
    (error, _), *_ = caught.value.failures.values()
    assert isinstance(error, UnsupportedValue)
    (file,) = tmp_path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointException) as caught:
        dcp.load({"x": torch.zeros(100_000)}, storage_reader=FileSystemReader(tmp_path))
    (error, _), *_ = caught.value.failures.values()
    assert isinstance(error, ChecksumMismatch)


def test_one_that_was_replaced_meanwhile(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    class Late(FileSystemReader):
        def prepare_local_plan(self, plan: Any) -> Any:
            checkpointer.save(tmp_path, {"x": torch.zeros(3)}, overwrite=True)
            return plan

    checkpointer.save(tmp_path, {"x": torch.ones(3)})
    with pytest.raises(CheckpointException, match="was overwritten while it was being loaded"):
        dcp.load({"x": torch.ones(3)}, storage_reader=Late(tmp_path))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match=r"\.metadata"):
        dcp.load({"x": torch.ones(3)}, storage_reader=FileSystemReader(tmp_path))
