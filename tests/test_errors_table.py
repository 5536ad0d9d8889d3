"""Every refusal and mismatch, made for real, and README's table of them.

``python -m tests.test_errors_table`` prints the table anew.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncdcp.errors import AsyncDCPError
from asyncdcp.state_dict.values import WAY_OUT
from tests.error_cases import calls, failures, states  # noqa: F401  # they add their cases
from tests.error_cases.cases import CASES

_README = Path(__file__).parents[1] / "README.md"
_BEGIN, _END = "<!-- errors: begin -->\n", "<!-- errors: end -->\n"
_LENGTH = 180
_HEADS = {
    "save": "A state that cannot be saved",
    "mismatch": "A state that a checkpoint does not fit",
    "call": "A call that cannot be carried out",
    "failure": "A save or load that comes to nothing",
}


def _shortened(message: str) -> str:
    lines = message.splitlines()
    listed = [number for number, line in enumerate(lines) if line.startswith("    ")]
    if listed:  # a list of lists: its first entry, and the head over it without its number
        head, entry = lines[listed[0] - 1].strip().rpartition(": ")[0], lines[listed[0]].strip()
    text = f"… {head}: {entry}" if listed else lines[0].replace(WAY_OUT, "…")
    text = re.sub(r"(\[0\]){3,}", "[0][0]…", text)
    text = re.sub(r" \(byte \d+\)", "", text)
    text = re.sub(r"\b[0-9a-f]{12,}\b", "<id>", text)
    text = re.sub(r"\btests\.error_cases\.states\.", "your.", text).replace("|", "\\|")
    if len(text) > _LENGTH:
        text = text[:_LENGTH].rsplit(" ", 1)[0].rstrip(",;:.") + " …"
    return f"`{text}`"


def _row(cause: str, make: Callable[[], object]) -> str:
    try:
        make()
    except AsyncDCPError as error:
        return f"| {cause} | `{type(error).__name__}` | {_shortened(str(error))} |\n"
    raise AssertionError(f"{cause}: nothing was raised")


def table() -> str:
    """All rows, as README holds them."""
    text = ""
    for section, head in _HEADS.items():
        rows = [_row(cause, make) for part, cause, make in CASES if part == section]
        text += f"\n| {head} | error | message, shortened |\n|---|---|---|\n{''.join(rows)}"
    return text + "\n"


@pytest.mark.parametrize(("section", "cause", "make"), CASES, ids=[cause for _, cause, _ in CASES])
def test_the_readme_has_it(section: str, cause: str, make: Callable[[], object]) -> None:
    listed = _README.read_text(encoding="utf-8").partition(_BEGIN)[2].partition(_END)[0]
    assert _row(cause, make) in listed.splitlines(keepends=True)


def test_the_readme_has_no_other() -> None:
    listed = _README.read_text(encoding="utf-8").partition(_BEGIN)[2].partition(_END)[0]
    causes = re.findall(r"^\| (.*?) \| `", listed, re.MULTILINE)
    assert causes == [cause for section in _HEADS for part, cause, _ in CASES if part == section]


if __name__ == "__main__":
    sys.stdout.write(_BEGIN + table() + _END)
