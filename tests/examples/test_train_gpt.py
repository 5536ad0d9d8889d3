"""The GPT example trains for real: killed in the middle of a save, and resumed bit for bit as if nobody had."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

_EXAMPLES = Path(__file__).parents[2] / "examples"


def _run(program: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            str(_EXAMPLES / program),
            "--dir",
            str(folder),
            "--steps",
            "6",
            "--save-every",
            "2",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _losses(output: str) -> dict[str, str]:
    """Step by step; the digits are those that make the float exactly."""
    return {line.split()[1]: line.split()[3] for line in output.splitlines() if line.startswith("step ")}


def test_the_losses_after_a_resume_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole = _run("train_sync.py", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed = _run("train_gpt.py", tmp_path / "run", "--kill-at", "4")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = _run("train_gpt.py", tmp_path / "run")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step " in resumed.stdout
    expected, found = _losses(whole.stdout), _losses(resumed.stdout)
    assert len(expected) == 6
    assert len(found) in (2, 4)  # from step 4 on if the background process had all of it, else from step 2 on
    assert found.items() <= expected.items()
    assert _losses(killed.stdout).items() <= expected.items()
    assert "checkpoints cost" in resumed.stdout


def test_wrong_input_is_refused_by_name(tmp_path: Path) -> None:
    refused = _run("train_gpt.py", tmp_path, "--kill-at", "3")
    assert refused.returncode == 2
    assert "--kill-at 3: no save begins there" in refused.stderr
