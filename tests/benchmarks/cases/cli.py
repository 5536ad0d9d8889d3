"""The command line: how soon it answers, and how soon it lists a run of a thousand checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from asyncdcp.envelope import encode_record
from asyncdcp.metadata import IndexRef, Record, Summary
from asyncdcp.names import data_name, index_name, make_save_id, record_name
from tests.benchmarks.measuring import Setting, place
from tests.benchmarks.results import Budget, Results

CHECKPOINTS: Final = {"tiny": 20}
"""By size; else a thousand."""


def run(setting: Setting) -> Results:
    """Each in a process of its own, the run's files in the kernel's memory."""
    count = CHECKPOINTS.get(setting.size, 1000)
    results = Results("cli", f"a command from its start to its end (ms); ls of {count} checkpoints", unit="ms")
    with place(setting) as folder:
        make_run(folder, count)
        for number in range(setting.rounds + 1):
            setting.progress(f"cli: round {number}")
            found = {"help": 1000 * _seconds("--help"), "ls": 1000 * _seconds("ls", str(folder))}
            if number:
                results.add("asyncdcp", **found)
    results.budgets = [Budget("asyncdcp", "help", 200.0), Budget("asyncdcp", "ls", 500.0)]
    return results


def _seconds(*arguments: str) -> float:
    program = [sys.executable, "-m", "asyncdcp.cli", *arguments]
    compiled = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    begun = time.perf_counter()
    subprocess.run(program, stdout=subprocess.DEVNULL, env=compiled, check=True)
    return time.perf_counter() - begun


def make_run(folder: Path, count: int) -> None:
    """Checkpoints without their tensors: a listing reads Records alone."""
    for number in range(count):
        save_id = make_save_id("run", str(number), 1)
        step = folder / f"step_{number}"
        step.mkdir(parents=True)
        (step / data_name(save_id, 0, 0)).write_bytes(b"d" * 100)
        (step / index_name(save_id, 0)).write_bytes(b"i" * 50)
        record = Record(
            save_id=save_id,
            outcome="commit",
            time=1.7e9 + number,
            world_size=1,
            versions={"asyncdcp": "0.1", "torch": "2.13.0", "python": "3.11"},
            indexes=[IndexRef(index_name(save_id, 0), 50, "")],
            summary=Summary(400, 10**9, 100, []),
            metrics={"loss": 3 / (number + 1), "accuracy": 0.5},
        )
        (step / record_name(save_id)).write_bytes(encode_record(record))
