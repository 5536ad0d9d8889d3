"""Four real gloo processes: every mesh and way to train at save, every other at load, bit for bit."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import world

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What came of each case on each rank: nothing, or a traceback."""
    folder = tmp_path_factory.mktemp("world")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-W", "error::ResourceWarning", "-m", "tests.ranks.world"]
    logs = [(folder / f"log-{rank}").open("w") for rank in range(world.WORLD)]
    running = [
        subprocess.Popen([*command, str(rank), port, str(folder)], cwd=ROOT, stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        for process in running:
            process.wait(100)
    finally:
        for process, log in zip(running, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    said = "\n".join((folder / f"log-{rank}").read_text()[-3000:] for rank in range(world.WORLD))
    assert [process.returncode for process in running] == [0] * world.WORLD, said
    return [json.loads((folder / f"outcomes-{rank}.json").read_text()) for rank in range(world.WORLD)]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", world.cases())
def test_case(outcomes: list[dict[str, str]], case: str) -> None:
    failures = [f"rank {rank}:\n{found[case]}" for rank, found in enumerate(outcomes) if case in found]
    assert not failures, "\n".join(failures)
