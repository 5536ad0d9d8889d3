"""The trainer of train_gpt.py as a plain loop: no asyncio anywhere, ``.result()`` where something must be waited for.

python examples/train_sync.py --steps 30
python examples/train_sync.py --steps 60 --dir runs/train_sync
"""

from __future__ import annotations

import sys
import time

from train_gpt import (  # type: ignore[import-not-found]  # beside this file, as a program is run
    Trainer,
    arguments,
    kill_this_process,
    newest_first,
)

from asyncdcp import AsyncCheckpointer, AsyncDCPError
from asyncdcp.errors import CheckpointNotFound


def main() -> None:
    """Resumes, trains, and leaves the block when the last save is durable."""
    args = arguments()
    with AsyncCheckpointer() as checkpointer:
        trainer = Trainer(args.seed, args.steps)
        for path in newest_first(args.dir):
            try:
                checkpointer.load(path, trainer.state).result()
            except CheckpointNotFound:
                continue
            print(f"{path.name}: resumed")
            break
        begun, called = time.perf_counter(), 0.0
        guard = checkpointer.guard(trainer.optimizer)
        while (step := trainer.progress["step"] + 1) <= args.steps:
            print(f"step {step:>4}/{args.steps}  loss {trainer.step()!r}")
            if step % args.save_every == 0:
                calling = time.perf_counter()
                dying = kill_this_process if step == args.kill_at else None
                checkpointer.save(args.dir / f"step_{step:06d}", trainer.state, on_progress=dying)
                called += time.perf_counter() - calling
        spent = called + guard.waited
        print(f"checkpoints cost {spent:.3f} s, {spent / (time.perf_counter() - begun):.2%} of the training")


if __name__ == "__main__":
    try:
        main()
    except AsyncDCPError as error:
        sys.exit(f"train_sync: {error}")
