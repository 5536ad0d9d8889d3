"""Train a small GPT with asyncio: everything that the next step depends on is in the state, and a guard keeps saves
whole.

    python examples/train_gpt.py --kill-at 40    # begins to save at step 40, and dies of SIGKILL in the middle of it
    python examples/train_gpt.py                 # resumes from the last committed step, and finishes

The state holds modules, optimizer and scheduler as they are, the random number generators and the place in the data.
The losses after a resume are bit for bit those of a run that nobody interrupted. Nothing in the loop waits for a save
but ``optimizer.step()``, and only while tensors are still being copied. ``asyncdcp ls runs/train_gpt`` shows the run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

from asyncdcp import (
    AsyncDCPError,
    CheckpointManager,
    EverySteps,
    KeepBest,
    KeepLast,
    OnPreemption,
    Progress,
    RNGState,
)

CONTEXT, BATCH, WIDTH, HEADS, LAYERS = 64, 8, 192, 4, 4


class Block(nn.Module):
    """Attention and a feed-forward network, each with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_feed = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, context, width) to the same."""
        batch, context, _ = x.shape
        heads = self.qkv(self.before_attention(x)).view(batch, context, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.project(seen.transpose(1, 2).reshape(batch, context, WIDTH))
        fed: Tensor = x + self.feed(self.before_feed(x))
        return fed


class GPT(nn.Module):
    """A decoder-only transformer over characters; the output layer is tied to the embedding."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, text: Tensor) -> Tensor:
        """(batch, context) of characters to the logits of each next one."""
        x = self.tokens(text) + self.positions(torch.arange(text.shape[1]))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class Data:
    """Python's own help topics, visited in random order, with a state as a data loader's."""

    def __init__(self, seed: int) -> None:
        text = "\n".join(topics.values())
        numbers = {character: number for number, character in enumerate(sorted(set(text)))}
        self.characters = len(numbers)
        self.text = torch.tensor([numbers[character] for character in text])
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        """(batch, context) of characters, and those that follow them."""
        starts = torch.randint(len(self.text) - CONTEXT - 1, (BATCH,), generator=self.generator)
        examples = self.text[starts[:, None] + torch.arange(CONTEXT + 1)]
        return examples[:, :-1], examples[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """Where the order of the data stands."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.generator.set_state(state["generator"])


class Trainer:
    """What is trained, with what, and how far it has come."""

    def __init__(self, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.data = Data(seed)
        self.model = GPT(self.data.characters)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=1e-3, total_steps=steps)
        self.progress = {"step": 0, "seed": seed, "steps": steps}
        self.state = {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "data": self.data,
            "rng": RNGState(),
            "progress": self.progress,
        }

    def step(self) -> float:
        """One step of training. Knows nothing of checkpoints."""
        inputs, targets = self.data.batch()
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.optimizer.step()
        self.schedule.step()
        self.progress["step"] += 1
        return loss.item()


def kill_this_process(progress: Progress) -> None:
    """SIGKILL in the middle of a save: if all was staged the background process commits it, else it was never there."""
    verb = {"stage": "staged", "write": "written"}[progress.stage]
    print(f"killed with {progress.done:,} of {progress.total:,} bytes {verb}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


async def train(manager: CheckpointManager, trainer: Trainer, args: argparse.Namespace) -> None:
    """Trains to the end, and says what checkpointing cost."""
    called, count = 0.0, 0
    begun = time.perf_counter()
    with manager.guard(trainer.optimizer) as guard:
        while (step := trainer.progress["step"] + 1) <= args.steps:
            loss = trainer.step()
            print(f"step {step:>4}/{args.steps}  loss {loss!r}")
            if manager.should_save(step):
                calling = time.perf_counter()
                dying = kill_this_process if step == args.kill_at else None
                manager.save(step, trainer.state, metrics={"loss": loss}, on_progress=dying)
                called, count = called + time.perf_counter() - calling, count + 1
            if step == args.kill_at:
                break  # a slow machine may die later than here
            if manager.preempted:
                print(f"asked to end: step {step} is saved, start again to go on")
                break
            await asyncio.sleep(0)  # whatever else runs on this loop has its turn
        total = time.perf_counter() - begun
        await manager.wait()  # raises if a save failed
        print(
            f"{count} checkpoints cost {called:.3f} s in save() and {guard.waited:.3f} s in optimizer.step(), "
            f"{(called + guard.waited) / total:.2%} of {total:.3f} s of training"
        )


def open_run(args: argparse.Namespace) -> CheckpointManager:
    """The run's checkpoints: one every few steps, and one when the job is asked to end; the last three, and the best
    one, are kept.
    """
    return CheckpointManager(
        args.dir, keep=KeepLast(3) | KeepBest("loss"), save_when=[EverySteps(args.save_every), OnPreemption()]
    )


async def run(args: argparse.Namespace) -> None:
    """One life of the training run."""
    async with open_run(args) as manager:
        trainer = Trainer(args.seed, args.steps)
        resumed = await manager.restore_latest(trainer.state)
        print(f"resumed at step {resumed.step}" if resumed else f"no checkpoint in {args.dir}: starting at step 0")
        await train(manager, trainer, args)


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--dir", type=Path, default=Path("runs/train_gpt"), help="of the run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="to train in all (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=10, metavar="STEPS", help="(default: %(default)s)")
    parser.add_argument("--kill-at", type=int, metavar="STEP", help="die in the middle of this step's save")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and dropout (default: %(default)s)")
    args = parser.parse_args()
    if args.steps < 1 or args.save_every < 1:
        parser.error("--steps and --save-every take whole numbers from 1 up")
    if args.kill_at is not None and (args.kill_at % args.save_every or not 0 < args.kill_at <= args.steps):
        parser.error(f"--kill-at {args.kill_at}: no save begins there; one begins every {args.save_every} steps")
    return args


if __name__ == "__main__":
    try:
        asyncio.run(run(arguments()))
    except AsyncDCPError as error:
        sys.exit(f"train_gpt: {error}")
