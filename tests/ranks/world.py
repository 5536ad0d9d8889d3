"""Four gloo processes that run every case in turn and write down what came of it. Started by ``test_world.py``.

python -m tests.ranks.world PORT FOLDER
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
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

from asyncdcp import AsyncCheckpointer, Options, PerRank, RNGState, SoleRank, TrainState
from asyncdcp.errors import DeadlineExceeded, PeerFailed, UnsupportedValue, WorkerCrashed
from asyncdcp.format.blocks import SLAB_BYTES
from asyncdcp.state_dict.chunks import local_chunks
from asyncdcp.storage.faults import FaultyStorage
from asyncdcp.storage.spec import Fault
from asyncdcp.worker.protocol import Leave

WORLD = 4
_PR_SET_PDEATHSIG = 1
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


# ── the dying, at the end ────────────────────────────────────────────────────────────────────────────────────────────


def dying(world: World) -> dict[str, str]:
    """A background process is killed in the middle of a save of four ranks, then a trainer; three ranks go on. The
    failures that this rank has seen.
    """
    found: dict[str, str] = {}
    options = Options(agreement_deadline=30, save_deadline=30, load_deadline=30, staging_bytes=SLAB_BYTES)
    four = AsyncCheckpointer(options, process=True, process_group=dist.group.WORLD)
    scenes = {"a background process": a_worker_dies, "one that sleeps": a_worker_sleeps, "a trainer": a_trainer_dies}
    for name, scene in scenes.items():
        try:
            scene(world, four)
        except Exception:  # noqa: BLE001  # the test shows it
            found[name] = traceback.format_exc()
    four.close()
    return found


def doomed_state(world: World, version: int) -> dict[str, Any]:
    """Of the last rank so much that it is not staged before something is written."""
    slabs = 4 if world.rank == WORLD - 1 else 0
    big = torch.full((slabs * SLAB_BYTES // 4 + 1,), float(version))
    return {"x": torch.full((8,), float(version)), "own": PerRank(big)}


def check_version(world: World, version: int) -> None:
    loaded = world.alone.load(world.folder / "dying", per_rank="drop").result()
    assert loaded["x"].tolist() == [version] * 8, loaded


def doomed_save(world: World, four: AsyncCheckpointer, version: int, victim: int, fault: Fault) -> BaseException | None:
    """A save that ``fault`` befalls on one rank. Its error, which must come before the deadline."""
    path = world.folder / "dying"
    where = FaultyStorage(path, [fault]) if world.rank == victim else path
    begun = time.monotonic()
    error = four.save(where, doomed_state(world, version), overwrite=True).exception()
    assert time.monotonic() - begun < 25
    return error


def a_worker_dies(world: World, four: AsyncCheckpointer) -> None:
    """It is rank 2's. The trainers go on, and so do their next saves."""
    four.save(world.folder / "dying", doomed_state(world, 1)).result()
    error = doomed_save(world, four, 2, 2, Fault("pwrite", 1, "kill"))
    if world.rank == 2:
        assert isinstance(error, WorkerCrashed) and error.signal == signal.SIGKILL, error
    else:
        assert isinstance(error, PeerFailed) and error.rank == 2, error
    check_version(world, 1)
    dist.barrier()
    four.save(world.folder / "dying", doomed_state(world, 3), overwrite=True).result()
    check_version(world, 3)


def a_worker_sleeps(world: World, four: AsyncCheckpointer) -> None:
    """Rank 1's, in an uninterruptible wait: SIGKILL does nothing to it. It wakes when the job was started again, and
    has saved to the same place.
    """
    options = Options(agreement_deadline=30, save_deadline=3, settle_seconds=5)
    with AsyncCheckpointer(options, process=True, process_group=dist.group.WORLD) as old:
        old.prepare(doomed_state(world, 4)).result()
        process = old._lanes.pipeline.process  # type: ignore[attr-defined]  # it has one
        kill, process._send_kill = process._send_kill, lambda: None
        error = doomed_save(world, old, 4, 1, Fault("pwrite", 1, "stop"))
        if world.rank == 1:
            assert isinstance(error, DeadlineExceeded), error
        else:
            assert isinstance(error, PeerFailed) and error.rank == 1, error
        check_version(world, 3)
        dist.barrier()
        four.save(world.folder / "dying", doomed_state(world, 5), overwrite=True).result()
        dist.barrier()
        process._send_kill = kill
        if world.rank == 1:
            woken = os.pidfd_open(process.pid)
            os.kill(process.pid, signal.SIGCONT)
            old._engine.call(process.post, Leave())  # it exits once it has settled the save in its own eyes
            assert select.select([woken], [], [], 20)[0]
            os.close(woken)
    dist.barrier()
    check_version(world, 5)


def a_trainer_dies(world: World, four: AsyncCheckpointer) -> None:
    """It is the last rank's, while it stages. The others are told by its background process, and go on as a new job
    that saves to the same place.
    """
    error = doomed_save(world, four, 6, WORLD - 1, Fault("pwrite", 1, "kill-trainer"))
    assert isinstance(error, PeerFailed) and error.rank == WORLD - 1, error
    check_version(world, 5)
    options = Options(agreement_deadline=20, save_deadline=20)
    with AsyncCheckpointer(options, process=True, process_group=world.groups[WORLD - 1]) as restarted:
        restarted.save(world.folder / "dying", doomed_state(world, 7), overwrite=True).result()
    check_version(world, 7)


def die_after_staging(world: World) -> None:
    """Every trainer that is left is killed once its part is staged; what becomes of the save, the background processes
    see to.
    """
    group = world.groups[WORLD - 1]
    checkpointer = AsyncCheckpointer(Options(agreement_deadline=20), process=True, process_group=group)
    state = {"x": torch.full((3,), 4.0), "own": PerRank(world.rank)}
    staged, _ = checkpointer.save(world.folder / "orphaned", state)
    staged.result(60)
    dist.barrier(group)
    os.kill(os.getpid(), signal.SIGKILL)


def one_rank(rank: int, port: str, folder: Path) -> None:
    """The life of one process, which does not return."""
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=40)
    )
    world = World(rank, folder)
    outcomes = {}
    for name, case in cases().items():
        dist.barrier()
        try:
            case(world)
        except Exception:  # noqa: BLE001  # the test shows it
            outcomes[name] = traceback.format_exc()
    (folder / f"outcomes-{rank}.json").write_text(json.dumps(outcomes))
    outcomes |= dying(world)
    (folder / f"outcomes-{rank}.json").write_text(json.dumps(outcomes))
    for checkpointer in world.checkpointers.values():
        checkpointer.close()
    die_after_staging(world)


def main(port: str, folder: Path) -> None:
    """Forks the ranks: that torch is imported once, and not by each of them, is half of what a world costs. How each
    ended is in ``codes.json``.
    """
    torch.set_num_threads(1)
    assert len(os.listdir("/proc/self/task")) == 1, "what is forked must have one thread"
    children = [_forked(rank, port, folder) for rank in range(WORLD)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (folder / "codes.json").write_text(json.dumps(codes))


def _forked(rank: int, port: str, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a test that gives up kills the parent alone
    log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        one_rank(rank, port, folder)
    except BaseException:  # noqa: BLE001  # no code of the parent's is to run here
        traceback.print_exc()
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
