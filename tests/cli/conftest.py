"""A run that was really saved, and the program called as a person calls it, in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from asyncdcp import RNGState, SyncCheckpointer
from asyncdcp.cli.main import main


class Ran(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.status in (0, 1), self.err
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line that a failed command says."""
        assert (self.status, self.out) == (2, ""), self
        assert self.err.startswith("asyncdcp: ") and self.err.count("\n") == 1, self.err
        return self.err.removeprefix("asyncdcp: ").strip()


Call = Callable[..., Ran]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """``call("ls", path)`` runs a command, without a terminal."""
    monkeypatch.setenv("TZ", "UTC")

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Ran(status, out, err)

    return run


class Small(torch.nn.Module):
    """Layers that are alike, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(40, 16)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))
        self.head = torch.nn.Linear(16, 40)
        self.head.weight = self.embed.weight


@pytest.fixture(scope="session")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    net = Small()
    with SyncCheckpointer(process=False) as checkpointer:
        for step in (10, 20):
            with torch.no_grad():
                net.head.bias.add_(0.5)
            half = net.head.bias.detach().to(torch.bfloat16)
            progress = {"step": step, "best": float("inf"), "tags": ("a", 1)}
            state = {"model": net, "rng": RNGState(), "progress": progress, "half": half}
            checkpointer.save(folder / f"step_{step}", state, metadata={"note": "small"})
    return folder


@pytest.fixture
def run(_saved: Path, tmp_path: Path) -> Iterator[Path]:
    """A run of two checkpoints, steps 10 and 20; a copy that the test may spoil."""
    shutil.copytree(_saved, tmp_path / "run")
    yield tmp_path / "run"


@pytest.fixture
def checkpoint(run: Path) -> Path:
    """The first of them."""
    return run / "step_10"
