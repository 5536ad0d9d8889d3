"""asyncdcp beside its peers and the machine's limits, in turns, in one run.

    python -m tests.benchmarks save load                    # two cases; without a name, all
    python -m tests.benchmarks --size small --rounds 3      # quick: a state of 0.15 GB
    python -m tests.benchmarks train --peers torch dcp      # beside these two; --peers alone: beside none
    python -m tests.benchmarks --json results.json --plot pictures

Times on a machine that does other things as well are worth little, and even the ratios suffer: let nothing else run.
GPT-2 small with Adam (1.49 GB) takes up to 12 GB of memory with all peers at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from asyncdcp.storage.posix import SYSTEM
from tests.benchmarks.cases import CASES
from tests.benchmarks.measuring import Setting
from tests.benchmarks.peers import OTHERS, peers_by_name
from tests.benchmarks.plots import plot
from tests.benchmarks.results import Results
from tests.benchmarks.states import SHAPES


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)} (default: all)")
    keys = ", ".join(peer.key for peer in OTHERS)
    parser.add_argument("--peers", nargs="*", metavar="PEER", help=f"of {keys} (default: what is installed)")
    parser.add_argument("--size", choices=sorted(SHAPES), default="gpt2", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="that count, after one to warm up (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=20, help="of each in the case train (default: %(default)s)")
    parser.add_argument("--dir", type=Path, default=Path(), help="on the filesystem to measure (default: here)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="takes every single measurement")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="takes pictures (PNG)")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.case) - set(CASES)):
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    if args.rounds < 1 or args.saves < 1:
        parser.error("--rounds and --saves take 1 or more")
    if not args.dir.is_dir():
        parser.error(f"--dir {args.dir} is not a directory")
    try:
        args.peers = peers_by_name(args.peers)
    except ValueError as error:
        parser.error(str(error))
    return args


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Where and with what it was measured."""
    return {
        "size": args.size,
        "rounds": args.rounds,
        "filesystem": SYSTEM.filesystem(os.path.realpath(args.dir)),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints each case's table as soon as it is there, and writes what was asked for."""
    args = arguments(argv)
    head = about(args)
    print(", ".join(f"{key} {value}" for key, value in head.items()))
    found: list[Results] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.dir) as folder:
        setting = Setting(Path(folder).resolve(), args.size, args.rounds, args.saves, args.peers)
        for name in args.case or CASES:
            begun = time.monotonic()
            results = CASES[name](setting)
            setting.progress(f"{name}: took {time.monotonic() - begun:.0f} s\n" if sys.stderr.isatty() else "")
            print(f"\n{results.table()}", flush=True)
            found.append(results)
            if args.plot is not None:
                plot(results, args.plot)
            if args.json is not None:  # after each case: a later one's failure loses nothing
                args.json.write_text(json.dumps({"about": head, "cases": [r.as_json() for r in found]}, indent=1))


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # of the peers; for good, so not where a test calls main
    main()
