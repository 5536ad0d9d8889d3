"""The FSDP example trains for real: killed on two ranks, it goes on with one, and the loss with it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = Path(__file__).parents[2] / "examples" / "train_fsdp.py"


def _start(rank: int, world_size: int, port: int, *arguments: str) -> subprocess.Popen[str]:
    """What torchrun does for a rank."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_PORT": str(port)}
    environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(_PROGRAM), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _run(world_size: int, *arguments: str) -> tuple[list[int], str, str]:
    """Exit codes, and what rank 0 said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [_start(rank, world_size, port, *arguments) for rank in range(world_size)]
    try:
        said = [process.communicate(timeout=100) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [process.returncode for process in running], said[0][0], said[0][1]


def _losses(output: str) -> dict[int, float]:
    return {int(line.split()[1]): float(line.split()[3]) for line in output.splitlines() if line.startswith("step ")}


@pytest.mark.timeout(200)
def test_the_loss_goes_on_in_another_world(tmp_path: Path) -> None:
    common = ("--dir", str(tmp_path / "run"), "--steps", "6", "--save-every", "2")
    codes, before, errors = _run(2, *common, "--kill-at", "5")
    assert codes == [-9, -9], errors
    codes, after, errors = _run(1, *common)
    assert codes == [0], errors
    assert "resumed at step 4" in after
    assert sorted(_losses(after)) == [5, 6]
    assert _losses(after)[5] == pytest.approx(_losses(before)[5], abs=1e-4)
