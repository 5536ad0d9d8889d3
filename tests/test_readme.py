"""The programs of README and of the pages it leads to run, its commands do what it says, and all it points to is there.

A program marked ``<!-- goes on from: NAME -->`` runs behind the one marked ``<!-- program: NAME -->``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_PARTS = (_ROOT / "asyncdcp", _ROOT / "tests")
_PAGES = [_ROOT / "README.md", *sorted(page for part in _PARTS for page in part.rglob("README.md"))]
_TEXTS = {page: page.read_text(encoding="utf-8") for page in _PAGES}
_README = _TEXTS[_PAGES[0]]
_BLOCK = re.compile(r"(?:^<!-- (program|goes on from): (\w+) -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
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


def _programs(text: str) -> list[str]:
    """Each whole, with what it goes on from. What others go on from runs with each of them."""
    blocks = _BLOCK.findall(text)
    named = {name: code for mark, name, code in blocks if mark == "program"}
    return [named[name] + code if mark else code for mark, name, code in blocks if mark != "program"]


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)


def test_programs_run(tmp_path: Path) -> None:
    programs = [program for text in _TEXTS.values() for program in _programs(text)]
    folders = [tmp_path / str(number) for number in range(len(programs))]
    for folder, program in zip(folders, programs, strict=True):
        folder.mkdir()
        (folder / "program.py").write_text(program)
    ran = _run([sys.executable, "-c", _STRICTLY, *map(str, folders)], tmp_path)
    assert ran.returncode == 0, f"{ran.stdout[-1000:]}\n{ran.stderr}"
    said = ran.stdout.split("program in ")[1:]
    assert [lines.count("\n") > 1 for lines in said] == [True] * len(folders), "each prints something"


def test_there_are_programs_and_both_commands() -> None:
    assert len(_programs(_README)) > 10
    assert set(_COMMANDS) == {"train", "test"}
    for command in _COMMANDS.values():
        assert "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e " in command


def test_every_block_of_code_is_run() -> None:
    """Programs by ``test_programs_run``; commands by ``tests/cli/test_documented.py``, or as examples; what needs
    somebody else's trainer, ``py``, by its tests in ``tests/interop``; an extension's ``toml`` by ``test_own.py``.
    """
    elsewhere = {"console": "cli", "py": "interop", "toml": "extensions"}
    for page, text in _TEXTS.items():
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if kind in elsewhere:
                assert page.parent.name == elsewhere[kind], block
            elif kind == "sh" and block not in _COMMANDS.values():
                assert all(line.startswith(("asyncdcp ", "torchrun ")) for line in block.splitlines()), block
            else:
                assert kind in ("python", "sh", "text", "mermaid"), block


def test_torchrun_calls_the_example_that_is_resharded() -> None:
    """``tests/examples/test_train_fsdp.py`` runs it: killed on two ranks, resumed on another number of them."""
    calls = re.findall(r"^torchrun --nproc-per-node \d (examples/\S+)(.*?) *#", _README, re.MULTILINE)
    assert calls == [("examples/train_fsdp.py", " --kill-at 7"), ("examples/train_fsdp.py", "")]


def test_the_train_command_calls_the_example_that_dies_and_resumes() -> None:
    """``tests/examples/test_train_small.py`` runs that: killed in the middle of a save, and resumed bit for bit."""
    calls = re.findall(r"^  \.venv/bin/python (examples/\S+)(.*)$", _COMMANDS["train"], re.MULTILINE)
    assert calls == [("examples/train_small.py", " --kill-at 40"), ("examples/train_small.py", "")]


@pytest.mark.parametrize("page", _PAGES, ids=[str(page.relative_to(_ROOT)) for page in _PAGES])
def test_what_it_points_to_is_there(page: Path) -> None:
    targets = set(re.findall(r"\]\(([^)\s]+)\)", _TEXTS[page]))
    local = {target.partition("#")[::2] for target in targets if not target.startswith("https://")}
    missing = [target for target, _ in local if not (page.parent / target).exists()]
    assert not missing
    unheard = [
        f"{target}#{heading}"
        for target, heading in local
        if heading and heading not in _headings((page.parent / target if target else page).read_text(encoding="utf-8"))
    ]
    assert not unheard


def _headings(text: str) -> set[str]:
    """As GitHub makes anchors of them."""
    lines = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_every_page_is_reached() -> None:
    for page in _PAGES[1:]:
        assert f"]({page.relative_to(_ROOT)}" in _README
