"""Four real gloo processes: every mesh and way to train at save, every other at load, bit for bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asyncdcp import AsyncCheckpointer, SoleRank
from asyncdcp.errors import CheckpointNotFound
from tests.ranks.meshes import WORLD, cases
from tests.work import LONG, free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> list[dict[str, str]]:
    """What came of each case on each rank: nothing, or a traceback."""
    command = [sys.executable, "-W", "error::ResourceWarning", "-m", "tests.ranks.world"]
    command += [str(free_port()), str(folder)]
    with (folder / "log").open("w") as log, subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as parent:
        try:
            parent.wait(200)
        finally:
            parent.kill()  # the ranks are killed with it
    said = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("log*")))
    codes = json.loads((folder / "codes.json").read_text()) if parent.returncode == 0 else None
    assert codes == [-signal.SIGKILL] * WORLD, said  # by themselves, at the end
    return [json.loads((folder / f"outcomes-{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("case", cases())
def test_case(outcomes: list[dict[str, str]], case: str) -> None:
    failures = [f"rank {rank}:\n{found[case]}" for rank, found in enumerate(outcomes) if case in found]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("scene", ["a background process", "one that sleeps", "a trainer"])
def test_one_that_is_killed_or_sleeps_is_named_and_costs_nothing(outcomes: list[dict[str, str]], scene: str) -> None:
    """In the middle of a save; what was saved before loads, and the next save works beside what is left there."""
    failures = [f"rank {rank}:\n{found[scene]}" for rank, found in enumerate(outcomes) if scene in found]
    assert not failures, "\n".join(failures)


def test_what_was_staged_is_committed_though_all_trainers_were_killed(
    outcomes: list[dict[str, str]], folder: Path
) -> None:
    """By their background processes, which nobody is left to wait for."""
    until = time.monotonic() + LONG
    with AsyncCheckpointer(process=False, process_group=SoleRank()) as alone:
        while True:
            try:
                loaded = alone.load(folder / "orphaned", per_rank="drop").result()
            except CheckpointNotFound:
                assert time.monotonic() < until
                time.sleep(0.05)
            else:
                break
    assert loaded["x"].tolist() == [4.0] * 3
