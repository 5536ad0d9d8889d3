"""The example trains for real: killed in the middle of a save, resumed, and bit for bit the run that nobody killed."""

from __future__ import annotations

import runpy
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from asyncdcp import SyncCheckpointer
from asyncdcp.errors import CheckpointNotFound
from tests.programs import Programs

_PROGRAM = Path(__file__).parents[2] / "examples" / "train_small.py"
_STEPS = ("--steps", "18", "--save-every", "6")
_CUT_OFF = """
import runpy, sys
import anyio
from asyncdcp.storage.local_writer import LocalWriter

async def write(self, offset, buffer, write=LocalWriter.write):
    if offset and "step_12" in self._path:  # no more than its first part: who tells of that may be slower than a disk
        await anyio.sleep_forever()
    await write(self, offset, buffer)

LocalWriter.write = write
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _losses(output: str) -> list[str]:
    """The lines that tell the loss; the digits of the last are those that make the float exactly."""
    return [line for line in output.splitlines() if "loss" in line]


def _is_committed(path: Path) -> bool:
    with SyncCheckpointer() as checkpointer:
        try:
            checkpointer.load(path)
        except CheckpointNotFound:
            return False
    return True


def _assert_same_tensors(one: Path, other: Path) -> None:
    with SyncCheckpointer() as checkpointer:
        first, second = (checkpointer.load(path)["trainer"] for path in (one, other))
    assert first["progress"] == second["progress"]
    assert torch.equal(first["rng"], second["rng"])
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name
    for number, moments in first["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, second["optimizer"]["state"][number][name]), (number, name)


@pytest.mark.timeout(480)  # three programs; a few seconds each where nothing else runs
def test_killed_in_the_middle_of_a_save_it_resumes_bit_for_bit(programs: Programs, tmp_path: Path) -> None:
    run = partial(programs.run, str(_PROGRAM))
    whole = run("--dir", str(tmp_path / "whole"), *_STEPS)
    assert whole.returncode == 0, whole.stderr

    folder = tmp_path / "run"
    killed = programs.run("-c", _CUT_OFF, str(_PROGRAM), "--dir", str(folder), *_STEPS, "--kill-at", "12")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "bytes written" in killed.stdout
    assert _is_committed(folder / "step_6")
    assert any((folder / "step_12").iterdir())
    assert not _is_committed(folder / "step_12")

    resumed = run("--dir", str(folder), *_STEPS)
    assert resumed.returncode == 0, resumed.stderr
    assert "step 12: its save was cut off" in resumed.stdout
    assert "step 6: resumed" in resumed.stdout
    assert "training was stalled" in resumed.stdout

    assert _losses(resumed.stdout) == _losses(whole.stdout)[1:]
    _assert_same_tensors(tmp_path / "whole" / "step_18", folder / "step_18")


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        ("--steps 30 --save-every 10 --kill-at 25", "--kill-at 25: no save begins there; saves begin at 10, 20, 30"),
        ("--steps many", "--steps: takes a whole number"),
        ("--save-every 0", "--save-every: takes a whole number from 1 up"),
        (f"--dir {_PROGRAM}", "is not a directory"),
    ],
)
def test_wrong_input_is_refused_by_name(
    command_line: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = runpy.run_path(str(_PROGRAM))
    monkeypatch.setattr(sys, "argv", [str(_PROGRAM), *command_line.split()])
    with pytest.raises(SystemExit) as refused:
        program["arguments"]()
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
