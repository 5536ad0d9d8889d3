"""The example runs, its checkpoints get smaller and secret, and it resumes to the same loss."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.programs import Programs

PROGRAM = Path(__file__).parents[2] / "examples" / "compress_encrypt.py"


def test_it_saves_less_and_hides_all_and_goes_on_as_if_nothing_had_been(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ASYNCDCP_KEY", raising=False)
    ran = programs.run(str(PROGRAM), "--width", "384", "--steps", "3", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    parts = {name: int(part) for name, part in re.findall(r"^(\w+): (\d+)% of", ran.stdout, re.MULTILINE)}
    assert parts["compressed"] == parts["encrypted"] <= 75 < 100 <= parts["plain"]
    assert re.findall(r"names can (not )?be read", ran.stdout) == ["", "", "not "]
    (mine, unbroken) = re.findall(r"loss is (\S+), and without a break (\S+)", ran.stdout)[0]
    assert mine == unbroken
    assert "without the key: " in ran.stdout
