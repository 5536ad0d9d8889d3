"""The long runs: ``python -m tests.reliability NAME --cases N --seed S``. Prints figures, or what replays a failure."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.reliability import fuzz, kills, objects, soak
from tests.reliability.corruption import examine
from tests.reliability.errors import FAULTS, sweep
from tests.reliability.power import Figures, explore, workloads
from tests.reliability.ranks import simulate
from tests.reliability.worlds import Seen


def power(cases: int, seed: int, figures: Figures) -> None:
    """Loss of power; ``cases`` states looked at for each call, all workloads of three steps on one and two ranks."""
    for ranks in (1, 2):
        seen = Seen()
        for round_ in range(seed, seed + 3):
            for steps in workloads():
                explore(steps, ranks=ranks, limit=cases, seed=round_, seen=seen, figures=figures)


def errors(cases: int, seed: int, figures: Figures) -> None:
    """Every call fails in every way; ``cases`` and ``seed`` mean nothing here."""
    for ranks in (1, 2):
        for kind in FAULTS:
            for sticky in (False, True):
                sweep(kind, ranks=ranks, sticky=sticky, figures=figures)


def saves(cases: int, seed: int, figures: Figures) -> None:
    """As ``errors``, of whole saves by ``AsyncCheckpointer``; ``cases`` of them in the background process."""
    from tests.reliability import saves  # imports torch, which the other runs do without

    for kind in FAULTS:
        for sticky in (False, True):
            saves.sweep(kind, sticky=sticky, figures=figures)
    with tempfile.TemporaryDirectory(dir=kills.FOLDER) as folder:
        saves.sweep_worker(Path(folder), cases, seed, figures)


def requests(cases: int, seed: int, figures: Figures) -> None:
    """Every request to an object store fails, or is a process's last; ``cases`` and ``seed`` mean nothing here."""
    for fault in objects.FAULTS:
        for sticky in (False, True):
            objects.sweep(fault, sticky=sticky, figures=figures)
        objects.sweep(fault, stops=True, figures=figures)


def corruption(cases: int, seed: int, figures: Figures) -> None:
    """Damage; ``cases`` sampled bits of each file's data, and every byte of everything else."""
    for ranks in (1, 2):
        examine(ranks, cases, seed, figures)


def ranks(cases: int, seed: int, figures: Figures) -> None:
    """``cases`` seeds of ranks that settle."""
    for number in range(seed, seed + cases):
        figures.update([simulate(number)])
        figures.update(seeds=1)


RUNS: dict[str, tuple[Callable[[int, int, Figures], None], int]] = {
    "power": (power, 400),
    "errors": (errors, 1),
    "saves": (saves, 500),
    "requests": (requests, 1),
    "corruption": (corruption, 5000),
    "ranks": (ranks, 10_000),
    "fuzz": (fuzz.run, 20_000),
    "kills": (kills.run, 500),
    "soak": (soak.run, 60),
}
"""What can be run, and how many cases by default; of a soak, seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("name", choices=RUNS)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where kills, saves and soak write; else a temporary folder")
    given = parser.parse_args()
    logging.disable()
    if given.folder is not None:
        kills.FOLDER = soak.FOLDER = given.folder
    run, cases = RUNS[given.name]
    figures, started = Figures(), time.monotonic()
    try:
        run(given.cases or cases, given.seed, figures)
    finally:
        seconds = time.monotonic() - started
        sys.stdout.write(f"{given.name}: {dict(figures)} in {seconds:.1f} s\n")


if __name__ == "__main__":
    main()
