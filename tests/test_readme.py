"""The README's programs run, its commands do what it says, and what it points to is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_README = (_ROOT / "README.md").read_text(encoding="utf-8")
_PROGRAMS = re.findall(r"^```python\n(.*?)^```$", _README, re.MULTILINE | re.DOTALL)
_COMMANDS = dict(re.findall(r"^<!-- command: (\w+) -->\n```sh\n(.*?)^```$", _README, re.MULTILINE | re.DOTALL))

# All in one interpreter, each in a folder of its own. Warnings are errors, but for what a save says where the temporary
# folder is a tmpfs. (-W knows no category of ours.)
_STRICTLY = """
import os, runpy, sys, warnings
from asyncdcp.errors import VolatileStorageWarning
warnings.simplefilter("error")
warnings.simplefilter("default", VolatileStorageWarning)
for folder in sys.argv[1:]:
    print("program in", folder, flush=True)
    os.chdir(folder)
    runpy.run_path("program.py", run_name="__main__")
"""


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)


def test_programs_run(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(len(_PROGRAMS))]
    for folder, program in zip(folders, _PROGRAMS, strict=True):
        folder.mkdir()
        (folder / "program.py").write_text(program)
    ran = _run([sys.executable, "-c", _STRICTLY, *map(str, folders)], tmp_path)
    assert ran.returncode == 0, f"{ran.stdout[-1000:]}\n{ran.stderr}"
    said = ran.stdout.split("program in ")[1:]
    assert [lines.count("\n") > 1 for lines in said] == [True] * len(folders), "each prints something"


def test_there_are_programs_and_both_commands() -> None:
    assert _PROGRAMS
    assert set(_COMMANDS) == {"train", "test"}
    for command in _COMMANDS.values():
        assert "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e " in command


def test_the_train_command_calls_the_example_that_dies_and_resumes() -> None:
    """``tests/examples/test_train_small.py`` runs that: killed in the middle of a save, and resumed bit for bit."""
    calls = re.findall(r"^  \.venv/bin/python (examples/\S+)(.*)$", _COMMANDS["train"], re.MULTILINE)
    assert calls == [("examples/train_small.py", " --kill-at 40"), ("examples/train_small.py", "")]


def test_what_it_points_to_is_there() -> None:
    targets = set(re.findall(r"\]\(([^)#]+)\)", _README))
    assert "tests/reliability/README.md" in targets
    missing = [target for target in targets if not (_ROOT / target).exists()]
    assert not missing
