"""A few of the real kills; the long runs are commands of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability import kills
from tests.reliability.kills import Heard
from tests.reliability.worlds import Lost

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "tests.reliability", *arguments]
    return subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)


def test_killed_at_random(tmp_path: Path) -> None:
    ran = command("kills", "--cases", "12", "--folder", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert "'kills': 12" in ran.stdout


def test_a_command_that_fails_says_what_replays_it() -> None:
    ran = command("ranks", "--cases", "nonsense")
    assert ran.returncode != 0 and "invalid int value" in ran.stderr


@pytest.mark.parametrize(
    ("said", "found", "lived"),
    [
        (b"begun 5\nstaged 5\nsaved 5\n", 4, False),  # acknowledged, and lost
        (b"begun 5\nstaged 5\n", 4, True),  # staged, and its worker lived on
        (b"begun 5\n", 6, False),  # never begun
        (b"begun 5\n", 3, False),  # older than what was there
    ],
)
def test_the_oracle_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch, said: bytes, found: int, lived: bool) -> None:
    monkeypatch.setattr(kills, "version_in_child", lambda path: found)
    heard = Heard()
    heard.hear(said[:9])
    heard.hear(said[9:])
    with pytest.raises(Lost, match=re.escape(f"found version {found}")):
        kills._check(Path("anywhere"), 4, heard, worker_lived=lived)
