"""Stall, time until durable, and load time of one state, against torch.save, safetensors and the raw limits.

    python -m tests.benchmarks.basic --size small
    python -m tests.benchmarks.basic --json results.json    # GPT-2 small with Adam, 1.49 GB; takes 8 GB of memory

All take turns in one run, on the same tensors and the same filesystem; files are deleted after each turn. Every turn
saves, drops its files from the page cache, loads in place, reads the files into the page cache, and loads again. What
is compared is a round's turns with each other: ratios are per round, and their median is given.

The raw limits are copies and I/O of the same bytes that make no checkpoint. They use asyncdcp's slab size and as many
threads: memcpy into an arena that is in memory already, O_DIRECT write and fsync from there, O_DIRECT read, and a read
of what is in the page cache.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import safetensors
import torch

from asyncdcp.format.blocks import SLAB_BYTES
from asyncdcp.storage.posix import PAGE, SYSTEM
from tests.benchmarks.states import SHAPES, bytes_of, gpt2_adam, tensors_of
from tests.benchmarks.subjects import AsyncDCP, Raw, SafeTensors, Seconds, Subject, TorchSave, opened

METRICS: Final = ("call", "stall", "durable", "cold load", "warm load")
RAW_NAMES: Final = {
    "stall": "raw memcpy",
    "durable": "raw write + fsync",
    "cold load": "raw read",
    "warm load": "raw read of the page cache",
}


def take_turn(subject: Subject, folder: Path, check: Callable[[], None] | None) -> Seconds:
    """One turn; ``check`` is called after the cold load, outside the times."""
    gc.collect()
    seconds = subject.save(folder)
    try:
        seconds["still cached"] = _drop_from_cache(folder)
        seconds["cold load"] = _timed(lambda: subject.load(folder, warm=False))
        if check is not None:
            check()
        _bring_into_cache(folder)
        seconds["warm load"] = _timed(lambda: subject.load(folder, warm=True))
    finally:
        shutil.rmtree(folder)
        os.sync()  # or the next one's fsync pays for the deletion
    return seconds


def _drop_from_cache(folder: Path) -> float:
    """Returns the share of the files' pages that is in the page cache all the same."""
    cached = pages = 0
    for path in folder.iterdir():
        with opened(path, os.O_RDONLY) as fd:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(fd).st_size
            cached += SYSTEM.cached_pages(fd, 0, size) or 0
            pages += -(-size // PAGE)
    return cached / pages


def _bring_into_cache(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.read(SLAB_BYTES):
                pass


def _timed(function: Callable[[], None]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def measure(source: Any, target: Any, folder: Path, args: argparse.Namespace) -> dict[str, list[Seconds]]:
    """The seconds of every subject's turns, by its name; the order of a round's turns moves on by one each round."""
    subjects: list[Subject] = [
        AsyncDCP(source, target, process=args.process),
        TorchSave(source, target),
        SafeTensors(source, target),
        Raw(source),
    ]
    samples: dict[str, list[Seconds]] = {subject.name: [] for subject in subjects}
    try:
        for number in range(args.warmup + args.rounds):
            first = number % len(subjects)
            for subject in subjects[first:] + subjects[:first]:
                checks = number == 0 and not isinstance(subject, Raw)
                check = _comparison(source, target, subject.name) if checks else None
                seconds = take_turn(subject, folder / f"turn-{number}", check)
                if number >= args.warmup:
                    samples[subject.name].append(seconds)
            print(f"round {number + 1} of {args.warmup + args.rounds} is over", file=sys.stderr)
    finally:
        for subject in subjects:
            subject.close()
    return samples


def _comparison(source: Any, target: Any, name: str) -> Callable[[], None]:
    """Clears the target; what is returned checks that a load has filled it."""
    sources, targets = tensors_of(source), tensors_of(target)
    for tensor in targets.values():
        tensor.zero_()

    def compare() -> None:
        wrong = [key for key, tensor in sources.items() if not torch.equal(tensor, targets[key])]
        if wrong:
            raise SystemExit(f"{name} did not load what it saved: {', '.join(wrong[:5])}")

    return compare


def ratios(samples: dict[str, list[Seconds]]) -> dict[str, list[float]]:
    """asyncdcp's seconds over each other one's of the same round."""
    found = {}
    for other, turns in samples.items():
        for metric in METRICS[1:]:
            name = RAW_NAMES[metric] if other == Raw.name else other
            pairs = zip(samples[AsyncDCP.name], turns, strict=True)
            if other != AsyncDCP.name:
                found[f"{metric} / {name}"] = [own[metric] / turn[metric] for own, turn in pairs]
    return found


def _summary(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table(samples: dict[str, list[Seconds]]) -> str:
    """Medians, lowest and highest: first of the seconds, then of the ratios."""
    lines = ["seconds: median (lowest to highest)", " " * 20 + "".join(f"{metric:<25}" for metric in METRICS)]
    for name, turns in samples.items():
        cells = [_summary([turn[m] for turn in turns]) if m in turns[0] else "" for m in METRICS]
        lines.append(f"{name:<20}" + "".join(f"{cell:<25}" for cell in cells))
    lines += [f"{Raw.name}: {'; '.join(f'{metric} is {name}' for metric, name in RAW_NAMES.items())}", ""]
    lines.append("asyncdcp's seconds over those of the same round: median (lowest to highest)")
    lines += [f"{name:<45}{_summary(values)}" for name, values in ratios(samples).items()]
    cached = max(turn["still cached"] for turns in samples.values() for turn in turns)
    if cached > 0.01:
        lines.append(f"not quite cold: up to {cached:.0%} of a file was still in the page cache")
    return "\n".join(line.rstrip() for line in lines)


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SHAPES), default="gpt2", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="that count (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before these (default: %(default)s)")
    parser.add_argument("--process", action="store_true", help="asyncdcp saves from its background process")
    parser.add_argument("--dir", type=Path, default=Path(), help="on the filesystem to measure (default: here)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="takes every single measurement")
    args = parser.parse_args()
    if args.rounds < 1 or args.warmup < 1:
        parser.error("--rounds and --warmup take 1 or more")
    if not args.dir.is_dir():
        parser.error(f"--dir {args.dir} is not a directory")
    return args


def main() -> None:
    """Measures and prints."""
    args = arguments()
    source, target = gpt2_adam(SHAPES[args.size]), gpt2_adam(SHAPES[args.size])
    about = {
        "size": args.size,
        "bytes": bytes_of(source),
        "tensors": len(tensors_of(source)),
        "rounds": args.rounds,
        "process": args.process,
        "filesystem": SYSTEM.filesystem(os.path.realpath(args.dir)),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
    }
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.dir) as folder:
        samples = measure(source, target, Path(folder), args)
    print(", ".join(f"{key} {value}" for key, value in about.items()), table(samples), sep="\n")
    if args.json is not None:
        args.json.write_text(json.dumps({"about": about, "seconds": samples, "ratios": ratios(samples)}, indent=1))


if __name__ == "__main__":
    main()
