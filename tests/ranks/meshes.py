"""What the four processes of ``world.py`` do one after another: save and load on every mesh, trained in every way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from asyncdcp import AsyncCheckpointer, Options, RNGState, SoleRank, TrainState
from asyncdcp.errors import PeerFailed, UnsupportedValue
from asyncdcp.state_dict.chunks import local_chunks

WORLD = 4
MESHES = {"1": (1,), "2": (2,), "3": (3,), "4": (4,), "2x2": (2, 2), "4x1": (4, 1)}
SAVED = ("2", "4", "2x2")
KINDS = {"ddp": "2", "fsdp": "4", "fsdp2": "2", "hsdp": "2x2", "tp": "2", "fsdp_tp": "2x2", "plain": "1"}
PAIRS = [
    ("ddp", "fsdp"),
    ("fsdp", "ddp"),
    ("fsdp", "hsdp"),
    ("hsdp", "fsdp2"),
    ("tp", "fsdp_tp"),
    ("fsdp_tp", "plain"),
    ("fsdp_tp", "tp"),
    ("plain", "fsdp_tp"),
]
PLACEMENTS: dict[int, list[list[Any]]] = {
    1: [[Shard(0)], [Shard(1)], [Replicate()]],
    2: [
        [Shard(0), Shard(1)],
        [Replicate(), Shard(0)],
        [Shard(1), Replicate()],
        [Shard(0), Shard(0)],
        [_StridedShard(0, split_factor=2), Shard(0)],
    ],
}
SHAPES = [(7, 5), (4, 4), (1, 3), (2, 9), (13, 2)]


class World:
    """This process among the others: meshes, groups and checkpointers over the first few ranks."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank = rank
        self.folder = folder
        self.meshes = {
            name: DeviceMesh("cpu", torch.arange(_size(name)).view(shape), mesh_dim_names=("dp", "tp")[: len(shape)])
            for name, shape in MESHES.items()
        }
        self.groups = {size: dist.new_group(list(range(size))) for size in (2, 3, 4)}
        options = Options(agreement_deadline=30, save_deadline=30, load_deadline=30)
        self.checkpointers = {
            size: AsyncCheckpointer(options, process=False, process_group=group)
            for size, group in self.groups.items()
            if rank < size
        }
        self.alone = self.checkpointers[1] = AsyncCheckpointer(options, process=False, process_group=SoleRank())

    def checkpointer(self, mesh: str) -> AsyncCheckpointer:
        return self.checkpointers[_size(mesh)]

    def has(self, mesh: str) -> bool:
        return self.rank < _size(mesh)


def _size(mesh: str) -> int:
    return int(torch.Size(MESHES[mesh]).numel())


# ── tensors ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def tensors(world: World, mesh: str, *, filled: bool = True) -> dict[str, Any]:
    """Uneven tensors, placed in all ways that there are for a mesh."""
    placements = PLACEMENTS[len(MESHES[mesh])]
    state = {}
    for number, shape in enumerate(SHAPES):
        content = torch.arange(100 * number, 100 * number + shape[0] * shape[1], dtype=torch.float64).view(shape)
        whole = content if filled else torch.full_like(content, -1)
        placed = placements[number % len(placements)]
        state[f"t{number}"] = distribute_tensor(whole, world.meshes[mesh], placed, src_data_rank=None)
    return state


def save_tensors(world: World, mesh: str) -> None:
    if world.has(mesh):
        world.checkpointer(mesh).save(world.folder / f"tensors-{mesh}", tensors(world, mesh)).result()


def load_tensors(world: World, saved: str, loaded: str) -> None:
    if not world.has(loaded):
        return
    state = tensors(world, loaded, filled=False)
    world.checkpointer(loaded).load(world.folder / f"tensors-{saved}", state).result()
    for name, expected in tensors(world, loaded).items():
        assert torch.equal(state[name].to_local(), expected.to_local()), name


# ── training ────────────────────────────────────────────────────────────────────────────────────────────────────────


def training(world: World, kind: str, seed: int) -> dict[str, Any]:
    """A model as ``kind`` wraps it, with a fresh optimizer."""
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7))
    mesh = world.meshes[KINDS[kind]]
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group())
    elif kind in ("fsdp", "fsdp2", "hsdp"):
        fully_shard(model, mesh=mesh)
    elif kind == "tp":
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    elif kind == "fsdp_tp":
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1), "step": seed}


def step(state: dict[str, Any]) -> None:
    torch.manual_seed(5)
    state["optimizer"].zero_grad()
    state["model"](torch.randn(4, 6)).square().sum().backward()
    state["optimizer"].step()


def save_training(world: World, kind: str) -> None:
    if world.has(KINDS[kind]):
        state = training(world, kind, 1)
        step(state)
        world.checkpointer(KINDS[kind]).save(world.folder / f"training-{kind}", state).result()


def load_training(world: World, saved: str, loaded: str, replicas: Literal["read", "broadcast"] = "read") -> None:
    """Compares every shard with what a process alone reads of it, and takes another step."""
    if not world.has(KINDS[loaded]):
        return
    state = training(world, loaded, 2)
    world.checkpointer(KINDS[loaded]).load(world.folder / f"training-{saved}", state, replicas=replicas).result()
    whole = world.alone.load(world.folder / f"training-{saved}").result()
    _compare(state["model"].state_dict(), whole["model"])
    assert state["step"] == 1
    parameters = [parameter for group in state["optimizer"].param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        own, stored = state["optimizer"].state[parameter], whole["optimizer"]["state"][number]
        assert type(own["exp_avg"]) is type(parameter.data), (type(own["exp_avg"]), type(parameter.data))
        _compare(own, stored)
    step(state)


def named_training(world: World, saved: str, loaded: str) -> None:
    """The same by parameters' names, into a fresh optimizer."""
    place = world.folder / f"named-{saved}-{loaded}"
    if world.has(KINDS[saved]):
        state = training(world, saved, 1)
        step(state)
        train = TrainState(state["model"], optimizers=state["optimizer"])
        world.checkpointer(KINDS[saved]).save(place, {"train": train}).result()
    dist.barrier()
    if world.has(KINDS[loaded]):
        state = training(world, loaded, 2)
        train = TrainState(state["model"], optimizers=state["optimizer"])
        world.checkpointer(KINDS[loaded]).load(place, {"train": train}).result()
        whole = world.alone.load(place).result()["train"]
        _compare({name.removeprefix("module."): t for name, t in state["model"].state_dict().items()}, whole["model"])
        for name, parameter in state["model"].named_parameters():
            own = state["optimizer"].state[parameter]
            assert type(own["exp_avg"]) is type(parameter.data)
            _compare(own, whole["optimizer"]["state"][name.removeprefix("module.")])
        step(state)


def _compare(own: dict[str, Any], whole: dict[str, torch.Tensor]) -> None:
    for name, tensor in own.items():
        expected = whole.get(name, whole.get(name.removeprefix("module."), whole.get(f"module.{name}")))
        assert expected is not None, (name, list(whole))
        for box, local in local_chunks(tensor):
            place = tuple(slice(start, start + size) for start, size in zip(*box, strict=True))
            assert torch.equal(local, expected[place]), name


# ── one by one ──────────────────────────────────────────────────────────────────────────────────────────────────────


def own_generators(world: World) -> None:
    """Each rank's random numbers go on where they were."""
    torch.manual_seed(world.rank)
    torch.rand(world.rank)
    checkpointer = world.checkpointers[4]
    checkpointer.save(world.folder / "rng", {"rng": RNGState()}).result()
    expected = torch.rand(3)
    torch.manual_seed(99)
    checkpointer.load(world.folder / "rng", {"rng": RNGState()}).result()
    assert torch.equal(torch.rand(3), expected)


def partial_is_refused(world: World) -> None:
    sums = DTensor.from_local(torch.ones(2), world.meshes["4"], [Partial()], run_check=False)
    try:
        world.checkpointers[4].save(world.folder / "partial", {"x": sums}).result()
    except (UnsupportedValue, PeerFailed) as error:
        assert "'x' is a torch.distributed.tensor.DTensor" in str(error) and "redistribute()" in str(error)
    else:
        raise AssertionError("it was saved")


def repeated_saves(world: World) -> None:
    """No collective on any group that this rank is of."""
    groups: list[Any] = [dist.group.WORLD, *(group for size, group in world.groups.items() if world.rank < size)]

    def collectives() -> list[int]:
        return [group._get_sequence_number_for_group() for group in groups]

    state, four = training(world, "fsdp", 1), world.checkpointers[4]
    four.save(world.folder / "first", state).result()
    for number in range(2):
        step(state)
        before = collectives()
        four.save(world.folder / f"repeated-{number}", state).result()
        assert collectives() == before
    dist.all_reduce(torch.ones(1))
    assert collectives()[0] == before[0] + 1  # that is how they are counted


def cases() -> dict[str, Callable[[World], None]]:
    """By name, in the order in which all ranks run them."""
    made: dict[str, Callable[[World], None]] = {}
    for saved in SAVED:
        made[f"save tensors {saved}"] = partial(save_tensors, mesh=saved)
        for loaded in MESHES:
            made[f"load tensors {saved} {loaded}"] = partial(load_tensors, saved=saved, loaded=loaded)
    for kind in KINDS:
        made[f"save {kind}"] = partial(save_training, kind=kind)
    for a, b in [*PAIRS, *((kind, kind) for kind in KINDS)]:
        made[f"load {a} {b}"] = partial(load_training, saved=a, loaded=b)
    for a, b in (("fsdp", "ddp"), ("ddp", "hsdp"), ("fsdp_tp", "tp")):
        made[f"load {a} {b}, read once"] = partial(load_training, saved=a, loaded=b, replicas="broadcast")
    for a, b in (("fsdp", "ddp"), ("ddp", "fsdp_tp"), ("hsdp", "plain")):
        made[f"named {a} {b}"] = partial(named_training, saved=a, loaded=b)
    made["own generators"] = own_generators
    made["partial"] = partial_is_refused
    made["repeated saves"] = repeated_saves
    return made
