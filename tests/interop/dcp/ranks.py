"""What two ranks do with the drop-in, each a process: run by ``test_drop_in_ranks.py``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from asyncdcp.interop.dcp import FileSystemReader, FileSystemWriter

State = dict[str, Any]


def make(mesh: DeviceMesh, step: int, place: Placement) -> State:
    torch.manual_seed(step)
    whole, bias = torch.randn(33, 700), torch.randn(50)
    return {
        "w": distribute_tensor(whole, mesh, [place]),
        "replicated": distribute_tensor(bias, mesh, [Replicate()]),
        "plain": bias + 1,
        "step": step,
    }


BOTH = (FileSystemReader, dcp.FileSystemReader)


def check_loads(mesh: DeviceMesh, path: Path, step: int, readers: Any = BOTH, *, resharded: bool = False) -> None:
    expected = make(mesh, step, Shard(0))
    for reader in readers:
        for place in (Shard(0), Shard(1), Replicate()) if resharded else (Shard(1),):
            target = make(mesh, step + 100, place)
            dcp.load(target, storage_reader=reader(path))
            assert torch.equal(target["w"].full_tensor(), expected["w"].full_tensor())
            assert torch.equal(target["replicated"].to_local(), expected["replicated"].to_local())
            assert torch.equal(target["plain"], expected["plain"]) and target["step"] == step


class FailsOnRankOne(FileSystemWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        done = super().write_data(plan, planner)
        if dist.get_rank() == 1:
            raise RuntimeError("rank 1 gives up")
        return done


def own_format(mesh: DeviceMesh, path: Path) -> None:
    """The same in asyncdcp's own format; plans that are cached, too."""
    options: Any = {"serialization_format": "safetensors"}
    for step in (5, 6, 7):
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(make(mesh, step, Shard(0)), storage_writer=FileSystemWriter(path, **options), planner=planner)
        check_loads(mesh, path, step, [FileSystemReader], resharded=step == 5)
    before = {file.name for file in path.iterdir()}
    dist.barrier()
    try:
        dcp.save(make(mesh, 8, Shard(1)), storage_writer=FailsOnRankOne(path, **options))
        raise AssertionError("it was committed")
    except CheckpointException as error:
        assert list(error.failures) == [1]
    assert {file.suffix for file in path.iterdir() if file.name not in before} == {".part"}
    check_loads(mesh, path, 7, [FileSystemReader])
    saved = dcp.async_save(make(mesh, 9, Shard(1)), storage_writer=FileSystemWriter(path, **options))
    saved.result()  # type: ignore[union-attr]  # there is no stager of one's own
    check_loads(mesh, path, 9, [FileSystemReader])
    alone = {"mine": torch.full((3,), float(dist.get_rank()))}
    dcp.save(alone, storage_writer=FileSystemWriter(path.parent / "own alone", **options), use_collectives=False)
    target = {"mine": torch.zeros(3)}
    dcp.load(target, storage_reader=FileSystemReader(path.parent / "own alone"))
    assert torch.equal(target["mine"], alone["mine"])


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    path = folder / "checkpoint"
    warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
    for step, threads in ((1, 1), (2, 2)):  # the second one overwrites the first
        dcp.save(make(mesh, step, Shard(0)), storage_writer=FileSystemWriter(path, thread_count=threads))
        check_loads(mesh, path, step, resharded=step == 1)
    try:
        dcp.save(make(mesh, 3, Shard(1)), storage_writer=FailsOnRankOne(path))
        raise AssertionError("it was published")
    except CheckpointException as error:
        assert list(error.failures) == [1]
    check_loads(mesh, path, 2)
    saved = dcp.async_save(make(mesh, 4, Shard(1)), storage_writer=FileSystemWriter(path))
    saved.result()  # type: ignore[union-attr]  # there is no stager of one's own
    check_loads(mesh, path, 4)
    alone = {"mine": torch.full((3,), float(rank))}
    dcp.save(alone, storage_writer=FileSystemWriter(folder / "alone", overwrite=False), use_collectives=False)
    target = {"mine": torch.zeros(3)}
    dcp.load(target, storage_reader=FileSystemReader(folder / "alone"))
    assert target["mine"].eq(rank).all()
    own_format(mesh, folder / "own")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
