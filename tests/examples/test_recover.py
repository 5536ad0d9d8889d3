"""The recovery example under torchrun: a rank is killed, comes back, gets its peer's state, and both go on alike."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

_PROGRAM = Path(__file__).parents[2] / "examples" / "recover.py"


def test_a_killed_rank_goes_on_from_its_peers_state(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*torchrun, str(_PROGRAM), "--dir", str(tmp_path / "run"), "--steps", "9", "--kill-at", "7"],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    assert "UserWarning" not in ran.stderr
    lines = ran.stdout.splitlines()
    assert "rank 0 lost a peer at step 6" in ran.stdout
    assert "rank 0 goes on at step 6 (live)" in lines
    assert "rank 1 goes on at step 6 (live, from rank 0)" in lines, "not from the checkpoint of step 4"
    steps = {rank: [int(n) for n in re.findall(rf"rank {rank} step (\d+) loss", ran.stdout)] for rank in (0, 1)}
    assert steps[0] == steps[1] == list(range(1, 10)), "no step is lost, and none made twice"
    digests = re.findall(r"has trained 9 steps, digest (\S+)", ran.stdout)
    assert len(digests) == 2
    assert len(set(digests)) == 1


def test_it_says_how_it_is_started() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    ran = subprocess.run([sys.executable, str(_PROGRAM)], capture_output=True, text=True, env=environment, timeout=150)
    assert ran.returncode == 2
    assert "start it by torchrun" in ran.stderr


def test_it_ends_where_torchrun_is_gone() -> None:
    """A lost store is no lost peer: to meet again was tried for ever, as fast as it went."""

    class Gone:
        def add(self, *_: Any) -> int:
            raise RuntimeError("Broken pipe")

    example = run_path(str(_PROGRAM))
    meeting = object.__new__(example["Meeting"])
    vars(meeting).update(_store=Gone(), _rank=0, _world=2, _generation="")
    with pytest.raises(ConnectionError, match="torchrun, which has the store, is gone: Broken pipe"):
        meeting.join()
