"""The FSDP example trains for real: killed on two ranks, it goes on with one, and the loss with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs import Programs
from tests.work import free_port

_PROGRAM = Path(__file__).parents[2] / "examples" / "train_fsdp.py"


def _run(programs: Programs, world_size: int, *arguments: str) -> tuple[list[int], str, str]:
    """Exit codes, and what rank 0 said."""
    port, running = free_port(), []
    for rank in range(world_size):  # what torchrun does
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        environment = {name: str(number) for name, number in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        running.append(programs.start(str(_PROGRAM), *arguments, env=environment))
    ended = [program.wait(100) for program in running]
    return [each.returncode for each in ended], ended[0].stdout, ended[0].stderr


def _losses(output: str) -> dict[int, float]:
    return {int(line.split()[1]): float(line.split()[3]) for line in output.splitlines() if line.startswith("step ")}


@pytest.mark.timeout(200)
def test_the_loss_goes_on_in_another_world(programs: Programs, tmp_path: Path) -> None:
    common = ("--dir", str(tmp_path / "run"), "--steps", "6", "--save-every", "2")
    codes, before, errors = _run(programs, 2, *common, "--kill-at", "5")
    assert codes == [-9, -9], errors
    codes, after, errors = _run(programs, 1, *common)
    assert codes == [0], errors
    assert "resumed at step 4" in after
    assert sorted(_losses(after)) == [5, 6]
    assert _losses(after)[5] == pytest.approx(_losses(before)[5], abs=1e-4)
