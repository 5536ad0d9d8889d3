"""Runs of tiny states on a local directory, and managers that a test can make in one word."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncdcp import CheckpointManager


class Training:
    """A state whose every value tells the step it is of."""

    def __init__(self) -> None:
        self.weight = torch.zeros(32)
        self.progress = {"step": 0}
        self.state = {"weight": self.weight, "progress": self.progress}

    def at(self, step: int) -> dict[str, Any]:
        """The state, brought to a step."""
        self.weight.fill_(step)
        self.progress["step"] = step
        return self.state

    @property
    def step(self) -> int:
        """The step that all of the state agrees on."""
        (value,) = set(self.weight.tolist())
        assert value == self.progress["step"]
        return int(value)


@pytest.fixture
def training() -> Training:
    return Training()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


Opened = Callable[..., CheckpointManager]


@pytest.fixture
def opened(run: Path) -> Iterator[Opened]:
    """Opens managers of the run, on threads, and closes those that the test has not."""

    def make(place: Any = None, **options: Any) -> CheckpointManager:
        options = {"process": False, "takeover_seconds": 0.0, **options}
        manager = CheckpointManager(run if place is None else place, **options)
        made.callback(manager.close)
        manager.open().result()
        return manager

    with ExitStack() as made:  # all are closed, even if one of them has something to say
        yield make


def save_all(manager: CheckpointManager, training: Training, *steps: int, **options: Any) -> None:
    """Saves these steps, one durable after another."""
    for step in steps:
        manager.save(step, training.at(step), **options).result()
    manager.wait().result()
