"""What saving costs a training loop, with the pipeline in the background process and on a thread, side by side.

    python -m tests.benchmarks.worker --size small
    python -m tests.benchmarks.worker --steps 60 --every 15 --json results.json

Training is a loop of matrix products on the machine's cores; before a save's next step it waits for ``staged``. A run
is the same steps with or without saves; "lost" is the difference in time per save. The lag of the trainer's own event
loop is measured in a second part, where it only ticks while a save goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from asyncdcp import AsyncCheckpointer, SaveHandle
from tests.benchmarks.states import SHAPES, gpt2_adam

MODES: Final = {"process": True, "thread": False}
TICK: Final = 0.001


class Training:
    """Steps of a fixed amount of work."""

    def __init__(self) -> None:
        self._a = torch.randn(768, 768)
        self._b = torch.randn(768, 768)

    def step(self) -> None:
        """About 20 ms on two cores."""
        for _ in range(8):
            torch.mm(self._a, self._b)


@contextmanager
def places(root: Path) -> Iterator[Callable[[], Path]]:
    """New directories below ``root``; each is deleted when the next but one is asked for, so that the disk does not
    fill.
    """
    made: list[Path] = []

    def place() -> Path:
        made.append(root / str(time.monotonic_ns()))
        if len(made) > 2:
            shutil.rmtree(made.pop(0), ignore_errors=True)
        return made[-1]

    yield place
    for path in made:
        shutil.rmtree(path, ignore_errors=True)


def run(training: Training, steps: int, save: Callable[[], SaveHandle] | None, every: int) -> tuple[float, list[float]]:
    """Seconds for ``steps`` steps with a save before each ``every``-th, and how long each save took to be durable. As
    a trainer without ``guard`` it waits for ``staged`` before it goes on. What is still being written at the end is
    waited for outside of the time, after as many steps as any run has.
    """
    handles: list[SaveHandle] = []
    begun = time.monotonic()
    for step in range(steps):
        if save is not None and step % every == 0:
            handles.append(save())
            handles[-1].staged.result()
        training.step()
    seconds = time.monotonic() - begun
    return seconds, [handle.result().durable_seconds for handle in handles]


async def lag(checkpointer: AsyncCheckpointer, place: Callable[[], Path], state: dict[str, Any]) -> list[float]:
    """How late the ticks of an otherwise idle loop came while a save went on."""
    late: list[float] = []
    handle = checkpointer.save(place(), state)
    while not handle.done():
        due = time.monotonic() + TICK
        await asyncio.sleep(TICK)
        late.append(time.monotonic() - due)
    await handle
    return late


def measure(state: dict[str, Any], options: argparse.Namespace, root: Path) -> dict[str, dict[str, float]]:
    """All modes in turns; per mode the medians over the rounds."""
    training = Training()
    found: dict[str, dict[str, list[float]]] = {mode: {"lost": [], "durable": [], "lag": []} for mode in MODES}
    checkpointers = {mode: AsyncCheckpointer(process=process) for mode, process in MODES.items()}
    with places(root) as place:
        for checkpointer in checkpointers.values():
            checkpointer.save(place(), state).result()  # takes the arena's memory, starts the worker
        for _ in range(options.rounds):
            for mode, checkpointer in checkpointers.items():
                alone, _ = run(training, options.steps, None, options.every)
                save = lambda checkpointer=checkpointer: checkpointer.save(place(), state)  # noqa: E731
                seconds, durable = run(training, options.steps, save, options.every)
                found[mode]["lost"].append((seconds - alone) / len(durable))
                found[mode]["durable"] += durable
                found[mode]["lag"] += asyncio.run(lag(checkpointer, place, state))
    for checkpointer in checkpointers.values():
        checkpointer.close()
    return {mode: summary(values) for mode, values in found.items()}


def summary(values: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds."""
    lags = sorted(values["lag"])
    seconds = {
        "lost per save": statistics.median(values["lost"]),
        "durable while training": statistics.median(values["durable"]),
        "loop lag p50": statistics.median(lags),
        "loop lag p99": lags[int(len(lags) * 0.99)],
        "loop lag p100": lags[-1],
    }
    return {name: 1000 * value for name, value in seconds.items()}


def start_times(count: int) -> dict[str, float]:
    """Milliseconds from nothing to a ready worker, and what it holds in memory without the arena, in MB."""
    code = """
        import asyncio, json, time
        from asyncdcp.config import Options
        from asyncdcp.worker.process import CheckpointProcess
        async def main():
            begun = time.monotonic()
            process = await CheckpointProcess.start(Options())
            seconds = time.monotonic() - begun
            rss = (await process.inspect()).rss_bytes
            await process.aclose(5)
            print(json.dumps([seconds, rss]))
        asyncio.run(main())
    """
    program = [sys.executable, "-c", "\n".join(line[8:] for line in code.splitlines())]
    seen = [json.loads(subprocess.run(program, capture_output=True, check=True).stdout) for _ in range(count)]
    return {"start": 1000 * statistics.median(s for s, _ in seen), "resident MB": max(r for _, r in seen) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SHAPES, default=next(iter(SHAPES)))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    root = options.folder / f"asyncdcp-worker-benchmark-{os.getpid()}"
    try:
        results = measure(gpt2_adam(SHAPES[options.size]), options, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    results["worker"] = start_times(5)
    for mode, values in results.items():
        print(mode, *(f"{name} {value:.1f}" for name, value in values.items()), sep="   ")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
