"""The trainer of train_gpt.py as a plain loop: no asyncio anywhere, ``.result()`` where something must be waited for.

python examples/train_sync.py --steps 30
python examples/train_sync.py --steps 60 --dir runs/train_sync
"""

from __future__ import annotations

import sys
import time

from train_gpt import Trainer, arguments, kill_this_process, open_run  # type: ignore[import-not-found]  # beside it

from asyncdcp import AsyncDCPError


def main() -> None:
    """Resumes, trains, and leaves the block when the last save is durable."""
    args = arguments()
    with open_run(args) as manager:
        trainer = Trainer(args.seed, args.steps)
        resumed = manager.restore_latest(trainer.state).result()
        if resumed is not None:
            print(f"resumed at step {resumed.step}")
        begun, called = time.perf_counter(), 0.0
        guard = manager.guard(trainer.optimizer)
        while (step := trainer.progress["step"] + 1) <= args.steps and not manager.preempted:
            loss = trainer.step()
            print(f"step {step:>4}/{args.steps}  loss {loss!r}")
            if manager.should_save(step):
                calling = time.perf_counter()
                dying = kill_this_process if step == args.kill_at else None
                manager.save(step, trainer.state, metrics={"loss": loss}, on_progress=dying)
                called += time.perf_counter() - calling
                if dying:
                    break  # a slow machine may die later than here
        spent = called + guard.waited
        print(f"checkpoints cost {spent:.3f} s, {spent / (time.perf_counter() - begun):.2%} of the training")


if __name__ == "__main__":
    try:
        main()
    except AsyncDCPError as error:
        sys.exit(f"train_sync: {error}")
