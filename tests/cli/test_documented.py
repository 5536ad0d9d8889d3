"""The examples on the command line's page print what it says, but for times, rates, save ids and versions."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.cli.conftest import Call
from tests.cli.documented import make_run

_ROOT = Path(__file__).parents[2]
_PAGE = (_ROOT / "asyncdcp" / "cli" / "README.md").read_text(encoding="utf-8")
_OTHERS = [_ROOT / "README.md", _ROOT / "asyncdcp" / "interop" / "README.md"]
_BLOCKS = re.findall(r"^```console\n(.*?)^```$", _PAGE, re.MULTILINE | re.DOTALL)
_VARYING = (
    (re.compile(r"\b[0-9a-f]{20}\b"), "<id>"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"), "<time>"),
    (re.compile(r"[\d.]+ [kMG]?B/s"), "<rate>"),
    (re.compile(r"\b[\d.]+ (ms|s)\b"), "<duration>"),
    (re.compile(r"(asyncdcp|torch|python) [\d.]+\S*\d(?=,|\n|$)"), r"\1 <version>"),
    (re.compile(r"(checkpoints), [\d.]+ kB"), r"\1, <size>"),
    (re.compile(r" +"), " "),
)


class Example(NamedTuple):
    """A command and what it prints."""

    command: str
    printed: str


def examples() -> list[Example]:
    """All that the page shows, in order."""
    parts = [part.split("\n", 1) for block in _BLOCKS for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [Example(command, printed) for command, printed in parts]


def steady(text: str) -> str:
    """Without what is different each time."""
    for pattern, instead in _VARYING:
        text = pattern.sub(instead, text)
    return "\n".join(line.strip() for line in text.splitlines()).strip()


@pytest.fixture(scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documented") / "gpt"
    make_run(folder)
    return folder


def test_the_examples_print_what_the_page_says(
    _made: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(_made, tmp_path / "runs" / "gpt")
    monkeypatch.chdir(tmp_path)
    commands = examples()
    assert {example.command.split()[1] for example in commands} >= {
        "ls", "inspect", "cat", "diff", "verify", "history", "gc", "report", "convert",
    }  # fmt: skip
    for example in commands:
        program, *arguments = shlex.split(example.command)
        assert program == "asyncdcp"
        ran = call(*arguments)
        printed = (ran.out + ran.err).replace(str(tmp_path), "/home/you")
        assert steady(printed) == steady(example.printed), example.command


@pytest.mark.parametrize("page", _OTHERS, ids=["README", "interop"])
def test_the_commands_on_other_pages_work(
    page: Path, _made: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(_made, tmp_path / "runs" / "gpt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "old.pt")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("asyncdcp ")]
    assert len(commands) > 2
    for command in commands:
        ran = call(*shlex.split(command, comments=True)[1:])
        assert ran.status == (1 if " diff " in command else 0), (command, ran)
