"""Train a small language model that saves while it trains, can be killed at any moment, and resumes bit for bit.

    python examples/train_small.py --kill-at 40    # begins to save at step 40, and dies of SIGKILL in the middle of it
    python examples/train_small.py                 # skips what was never committed, resumes at step 20, and finishes

The model predicts the next character of Python's own help topics. Its checkpoints hold weights, optimizer, the state of
the random number generator and the place in the data, so the losses after a resume are exactly those of a run that
nobody interrupted.
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
from torch import nn

from asyncdcp import AsyncDCPError, CheckpointManager, Options, Progress, SaveHandle, Telemetry
from asyncdcp.manager import Event

CONTEXT, BATCH, HIDDEN = 16, 128, 1024  # characters that the model sees, examples in a step, width


class Trainer:
    """A model, its optimizer, its data, and how far it has come."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        text = "\n".join(topics.values())
        characters = {character: number for number, character in enumerate(sorted(set(text)))}
        self.text = torch.tensor([characters[character] for character in text])
        self.starts = torch.randperm(len(text) - CONTEXT)  # the order of the examples follows from the seed
        self.model = nn.Sequential(
            nn.Embedding(len(characters), 32),
            nn.Flatten(),
            nn.Linear(32 * CONTEXT, HIDDEN),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(HIDDEN, HIDDEN),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(HIDDEN, len(characters)),
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.seed, self.step, self.position, self.loss = seed, 0, 0, float("nan")

    def compute_gradients(self) -> None:
        """One forward and one backward pass. Reads the weights and changes none of what is saved."""
        start = self.starts[torch.arange(self.position, self.position + BATCH) % len(self.starts)]
        examples = self.text[start[:, None] + torch.arange(CONTEXT + 1)]
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(examples[:, :-1]), examples[:, -1])
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.loss = loss.item()

    def update(self) -> None:
        """Changes weights and optimizer."""
        self.optimizer.step()
        self.position = (self.position + BATCH) % len(self.starts)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on: the live tensors, not copies of them, and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "progress": {"step": self.step, "position": self.position, "loss": self.loss, "seed": self.seed},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where ``state_dict`` was called."""
        progress = state["progress"]
        if progress["seed"] != self.seed:
            raise ValueError(f"the run was begun with --seed {progress['seed']}, not {self.seed}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.step, self.position, self.loss = progress["step"], progress["position"], progress["loss"]


def say(event: Event) -> None:
    """What the manager found when it opened the run: saves that were killed left files, but no checkpoint."""
    if event.kind == "settled":
        print(f"step {event.step}: its save was cut off, there is no checkpoint")


async def resume(manager: CheckpointManager, trainer: Trainer) -> None:
    """Goes on from the newest checkpoint."""
    begun = time.perf_counter()
    restored = await manager.restore_latest({"trainer": trainer})
    if restored is None:
        print(f"no checkpoint in {manager.location}: starting at step 0")
    else:
        print(f"step {restored.step}: resumed, loaded and verified in {time.perf_counter() - begun:.3f} s")


def kill_this_process(progress: Progress) -> None:
    """SIGKILL as soon as a part of the checkpoint is on its way to the disk: no handler runs, nothing is cleaned up.

    A slow machine may tell of that part late, when all is written: then the save may be a checkpoint, or not.
    """
    if progress.stage == "write":
        print(f"killed with {progress.done:,} of {progress.total:,} bytes written", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


async def train(manager: CheckpointManager, trainer: Trainer, args: argparse.Namespace) -> None:
    """Trains to ``args.steps`` and says at the end what checkpointing cost."""
    saves: list[SaveHandle] = []
    stalled = 0.0  # seconds in which training waited for a checkpoint
    begun = time.perf_counter()
    while trainer.step < args.steps:
        trainer.compute_gradients()
        if saves:
            waiting = time.perf_counter()
            await saves[-1].staged  # until then the tensors that are being saved must not change
            stalled += time.perf_counter() - waiting
        trainer.update()
        if trainer.step % args.save_every == 0 or trainer.step == args.steps:
            dying = trainer.step == args.kill_at
            saving = time.perf_counter()
            save = manager.save(
                trainer.step,
                {"trainer": trainer},
                metrics={"loss": trainer.loss},
                on_progress=kill_this_process if dying else None,
            )
            stalled += time.perf_counter() - saving
            saves.append(save)
            print(f"step {trainer.step:>4}/{args.steps}  loss {trainer.loss:.6f}  saving {Path(save.path).name}")
            if dying:
                await save
                raise SystemExit("train_small: the save was committed before the process was killed")
    trained = time.perf_counter() - begun
    results = [await save for save in saves]  # each raises if its save failed
    waited = time.perf_counter() - begun - trained
    if results:
        size, durable = results[-1].tensor_bytes / 1e6, max(result.durable_seconds for result in results)
        print(f"{len(results)} checkpoints of {size:.1f} MB, each durable within {durable:.3f} s of its save()")
        print(f"training was stalled by them for {stalled:.3f} s of {trained:.3f} s, {stalled / trained:.2%},")
        print(f"and the program waited another {waited:.3f} s at its end for the last one to be durable")
    print(f"final loss {trainer.loss!r}")


async def run(args: argparse.Namespace) -> None:
    """One life of the training run: resume, train. Leaving the block waits until every save is settled."""
    # On a thread, so that a save dies with this process: a background process would finish what it has, and the next
    # run would wait for it longer. To die in the middle there is little memory to copy into, so that a part has to be
    # written before the next can be copied.
    options = Options() if args.kill_at is None else Options(staging_bytes=8 << 20)
    telemetry = Telemetry(on_event=say)
    async with CheckpointManager(
        args.dir, options=options, process=False, takeover_seconds=1, telemetry=telemetry
    ) as manager:
        trainer = Trainer(args.seed)
        await resume(manager, trainer)
        if trainer.step >= args.steps:
            print(f"nothing to do: step {trainer.step} was reached, and --steps is {args.steps}")
        if args.kill_at is not None and trainer.step >= args.kill_at:
            raise SystemExit(f"train_small: --kill-at {args.kill_at} has passed: the run is at step {trainer.step}")
        await train(manager, trainer, args)


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--dir", type=Path, default=Path("runs/train_small"), help="of the run (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=80, help="to train in all (default: %(default)s)")
    parser.add_argument("--save-every", type=positive, default=20, metavar="STEPS", help="(default: %(default)s)")
    parser.add_argument("--kill-at", type=positive, metavar="STEP", help="die in the middle of this step's save")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order, dropout (default: %(default)s)")
    args = parser.parse_args()
    if args.dir.exists() and not args.dir.is_dir():
        parser.error(f"--dir {args.dir} is not a directory")
    saved = [*range(args.save_every, args.steps, args.save_every), args.steps]
    if args.kill_at is not None and args.kill_at not in saved:
        parser.error(f"--kill-at {args.kill_at}: no save begins there; saves begin at {', '.join(map(str, saved))}")
    return args


def positive(text: str) -> int:
    """An int of at least 1."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number from 1 up, not {text!r}")
    return number


if __name__ == "__main__":
    try:
        asyncio.run(run(arguments()))
    except AsyncDCPError as error:
        sys.exit(f"train_small: {error}")
