"""Train with FSDP2 on several processes, and go on with another number of them.

    torchrun --nproc-per-node 2 examples/train_fsdp.py --kill-at 6    # all ranks die of SIGKILL after step 6
    torchrun --nproc-per-node 1 examples/train_fsdp.py                # resumes, resharded, and the loss goes on
    torchrun --nproc-per-node 4 examples/train_fsdp.py --steps 40     # and again

Gloo on CPUs, NCCL on GPUs, the same program. Each rank writes its own shards; a load reads what this rank's shards
need, from whatever shards there are. All processes together always see the same batch, so the losses are the same for
any number of them, but for the order in which floats are added up.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from asyncdcp import AsyncDCPError, CheckpointManager, EverySteps, KeepLast, TrainState

BATCH, WIDTH, CLASSES = 24, 64, 10  # the batch is divided evenly among 1, 2, 3, 4, 6 or 8 ranks


def build(device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same weights on every rank, each of which keeps its shards."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH)) for _ in range(4)]
    model = nn.Sequential(*blocks, nn.Linear(WIDTH, CLASSES)).to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3)


def batch(step: int, device: str) -> tuple[Tensor, Tensor]:
    """This rank's part of a step's batch, which depends on the step alone."""
    made = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, WIDTH, generator=made)
    labels = inputs[:, :CLASSES].argmax(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    return inputs[rank::world].to(device), labels[rank::world].to(device)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, device: str) -> float:
    """The loss over the whole batch."""
    inputs, labels = batch(step, device)
    loss = nn.functional.cross_entropy(model(inputs), labels)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch has not typed it
    optimizer.step()
    mean = loss.detach()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


async def run(args: argparse.Namespace, device: str) -> None:
    """One life of the training run, on each rank."""
    model, optimizer = build(device)
    state = {"train": TrainState(model, optimizers=optimizer)}
    leads = dist.get_rank() == 0
    async with CheckpointManager(args.dir, keep=KeepLast(3), save_when=EverySteps(args.save_every)) as manager:
        resumed = await manager.restore_latest(state)
        first = resumed.step if resumed else 0
        if leads:
            print(f"resumed at step {first}" if resumed else f"no checkpoint in {args.dir}: starting at step 0")
        manager.guard(optimizer)
        for step in range(first + 1, args.steps + 1):
            loss = train_step(model, optimizer, step, device)
            if leads:
                print(f"step {step} loss {loss:.6f}", flush=True)
            if manager.should_save(step):
                manager.save(step, state, metrics={"loss": loss})
            if step == args.kill_at:
                await manager.wait()
                dist.barrier()
                os.kill(os.getpid(), signal.SIGKILL)
            await asyncio.sleep(0)


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--dir", type=Path, default=Path("runs/train_fsdp"), help="of the run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="to train in all (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=5, metavar="STEPS", help="(default: %(default)s)")
    parser.add_argument("--kill-at", type=int, metavar="STEP", help="all ranks die after this step")
    args = parser.parse_args()
    if args.steps < 1 or args.save_every < 1:
        parser.error("--steps and --save-every take whole numbers from 1 up")
    return args


def main() -> None:
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        asyncio.run(run(args, device))
    except AsyncDCPError as error:
        sys.exit(f"train_fsdp: {error}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
