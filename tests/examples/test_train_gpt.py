"""The GPT example trains for real: killed in the middle of a save, and resumed bit for bit as if nobody had."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncdcp.names import record_save_id
from tests.programs import Programs
from tests.work import LONG

_EXAMPLES = Path(__file__).parents[2] / "examples"


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(programs: Programs) -> Run:
    def run(program: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        common = ("--dir", str(folder), "--steps", "6", "--save-every", "2")
        return programs.run(str(_EXAMPLES / program), *common, *arguments)

    return run


def _losses(output: str) -> dict[str, str]:
    """Step by step; the digits are those that make the float exactly."""
    return {line.split()[1]: line.split()[3] for line in output.splitlines() if line.startswith("step ")}


def _wait_for_commit(checkpoint: Path) -> None:
    """The background process outlives who is killed, and may not even have begun by then."""
    until = time.monotonic() + LONG
    while not any(record_save_id(path.name) for path in checkpoint.glob("*.json")):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_the_losses_after_a_resume_are_those_of_an_uninterrupted_run(run: Run, tmp_path: Path) -> None:
    whole = run("train_sync.py", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed = run("train_gpt.py", tmp_path / "run", "--kill-at", "4")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    _wait_for_commit(tmp_path / "run" / "step_2")
    resumed = run("train_gpt.py", tmp_path / "run")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step " in resumed.stdout
    expected, found = _losses(whole.stdout), _losses(resumed.stdout)
    assert len(expected) == 6
    assert len(found) in (2, 4)  # from step 4 on if the background process had all of it, else from step 2 on
    assert found.items() <= expected.items()
    assert _losses(killed.stdout).items() <= expected.items()
    assert "checkpoints cost" in resumed.stdout


def test_wrong_input_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    refused = run("train_gpt.py", tmp_path, "--kill-at", "3")
    assert refused.returncode == 2
    assert "--kill-at 3: no save begins there" in refused.stderr
