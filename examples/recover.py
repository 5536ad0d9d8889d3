"""Data-parallel training in which a rank is killed, started again, and gets its state from its peer.

    torchrun --standalone --nproc-per-node 2 examples/recover.py --dir run --steps 12 --kill-at 5

torchrun starts everything anew when a process of its own fails, so each of them is only a small supervisor here, that
starts a trainer and starts it again when it is killed. The trainers meet in torchrun's store, which outlives them. When
a peer is lost, the others keep their state, wait until it is back, make a new process group, and ``recover``: who has
the newest step sends it, who has none receives it. If nobody were left, all would load the newest checkpoint.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

RESTARTS = 3
TIMEOUT = 30.0
COMES_BACK = 120.0
"""How many seconds a trainer may take to start."""


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("run"), help="where checkpoints go (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=4, metavar="STEPS", help="(default: %(default)s)")
    parser.add_argument("--kill-at", type=int, metavar="STEP", help="the last rank kills itself there, once")
    parser.add_argument("--trainer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 1 or args.save_every < 1:
        parser.error("--steps and --save-every take 1 or more")
    if "RANK" not in os.environ:
        parser.error("start it by torchrun, such as: torchrun --standalone --nproc-per-node 2 examples/recover.py")
    return args


def supervise() -> int:
    """Starts a trainer, and again if it is killed."""
    for _ in range(1 + RESTARTS):
        code = subprocess.call([sys.executable, *sys.argv, "--trainer"])
        if code >= 0:
            return code
    return 1


class Meeting:
    """Where the ranks find each other again. A generation is how often each of them has been started."""

    def __init__(self, rank: int, world: int) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch exports it without saying so

        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=TIMEOUT))
        self._rank, self._world = rank, world
        self._generation = ""
        self.started = self._store.add(f"started/{rank}", 1)

    def join(self) -> None:
        """Makes the process group of a new generation, once all ranks are there. TimeoutError if one stays away, and
        ConnectionError if torchrun is gone: waiting would not help.
        """
        import torch.distributed as dist
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # as above

        counts, until = [0], time.monotonic() + COMES_BACK
        while 0 in counts or self._generation == str(counts):
            if time.monotonic() > until:
                raise TimeoutError(f"not all ranks were there within {COMES_BACK:g} s; started so far: {counts}")
            time.sleep(0.02)
            counts = self._counts()
        self._generation = str(counts)
        store = PrefixStore(self._generation, self._store)
        limit = timedelta(seconds=TIMEOUT)
        dist.init_process_group("gloo", store=store, rank=self._rank, world_size=self._world, timeout=limit)

    def _counts(self) -> list[int]:
        try:
            return [self._store.add(f"started/{rank}", 0) for rank in range(self._world)]
        except RuntimeError as error:
            raise ConnectionError(f"torchrun, which has the store, is gone: {error!s:.80}") from error

    def leave(self) -> None:
        """Lets go of a group that has lost a rank."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


class Progress:
    """How far the training has come."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        """As asyncdcp asks for it."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """As asyncdcp gives it back."""
        self.step = state_dict["step"]


class Trainer:
    """One rank's model, optimizer and progress."""

    def __init__(self, rank: int, world: int, kill_at: int | None) -> None:
        import torch

        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 64))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.progress = Progress()
        self.live: int | None = None
        """The step of the state in memory; None while that is no state to go on from."""
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "progress": self.progress}
        self._rank, self._world, self._kill_at = rank, world, kill_at

    def step(self) -> float:
        """One step on this rank's share of the data; raises RuntimeError, with nothing changed, if a peer is gone."""
        import torch
        import torch.distributed as dist

        torch.manual_seed(1000 * self.progress.step + self._rank)
        data = torch.randn(32, 64)
        self.optimizer.zero_grad()
        loss = (self.model(data) - data.flip(1)).square().mean()
        loss.backward()
        if self.progress.step + 1 == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        total = torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])  # type: ignore[union-attr]  # after backward
        dist.all_reduce(total)
        parts = torch.split(total / self._world, [parameter.numel() for parameter in self.model.parameters()])
        for parameter, part in zip(self.model.parameters(), parts, strict=True):
            parameter.grad = part.view_as(parameter)
        self.optimizer.step()
        self.progress.step += 1
        return float(loss.detach())

    def digest(self) -> str:
        """The parameters in one number, to compare ranks by."""
        return float(sum(float(parameter.detach().double().sum()) for parameter in self.model.parameters())).hex()


def train(args: argparse.Namespace) -> None:
    """Trains to the end, through as many generations as it takes."""
    from asyncdcp import CheckpointManager, EverySteps, SoleRank

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = Meeting(rank, world)
    dies = args.kill_at if rank == world - 1 and meeting.started == 1 else None
    trainer = Trainer(rank, world, dies)
    # All replicas are alike: rank 0 writes, by itself, and the others only read.
    manager = CheckpointManager(
        args.dir, save_when=EverySteps(args.save_every), process_group=SoleRank(), process=False, read_only=rank > 0
    )
    with manager:
        if rank == 0:
            manager.guard(trainer.optimizer)
        while trainer.live != args.steps:
            try:
                meeting.join()
                recover_state(trainer, manager)
                train_on(args, trainer, manager)
            except RuntimeError as error:
                say(f"rank {rank} lost a peer at step {trainer.progress.step}: {error!s:.60}")
                meeting.leave()
    meeting.leave()
    say(f"rank {rank} has trained {trainer.progress.step} steps, digest {trainer.digest()}")


def recover_state(trainer: Trainer, manager: Any) -> None:
    """All ranks come to the newest state that there is; RuntimeError if a peer is lost on the way."""
    from asyncdcp.errors import AsyncDCPError
    from asyncdcp.transport import PGTransport, recover

    had, trainer.live = trainer.live, None  # if this fails, the state may be partly written
    with PGTransport(None, timeout=TIMEOUT) as transport:
        try:
            found = recover(transport, trainer.state, step=had, manager=manager).result()
        except AsyncDCPError as error:
            raise RuntimeError(f"recovery failed: {error}") from error
        origin = "" if found.rank is None else f", from rank {found.rank}"
        say(f"rank {transport.rank} goes on at step {trainer.progress.step} ({found.source}{origin})")
    trainer.live = trainer.progress.step


def train_on(args: argparse.Namespace, trainer: Trainer, manager: Any) -> None:
    """Trains to the end; RuntimeError if a peer is lost on the way."""
    rank = int(os.environ["RANK"])
    while trainer.progress.step < args.steps:
        loss = trainer.step()
        step = trainer.live = trainer.progress.step
        say(f"rank {rank} step {step} loss {loss:.6f}")
        if rank == 0 and manager.should_save(step):
            manager.save(step, trainer.state)


def say(line: str) -> None:
    """Prints a line in one piece: several processes write to one terminal."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """A supervisor, or its trainer."""
    args = arguments()
    if args.trainer:
        train(args)
    else:
        sys.exit(supervise())


if __name__ == "__main__":
    main()
