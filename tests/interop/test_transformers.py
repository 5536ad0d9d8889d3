"""The callback in a real, tiny ``Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from asyncdcp.manager import CheckpointManager, EverySteps
from asyncdcp.runs import KeepLast
from tests.interop.page import example

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainer's own, about what a tiny one lacks


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x: Any, labels: Any = None) -> dict[str, Any]:
        return {"loss": (self.layer(x).squeeze(-1) - labels).square().mean()}


ROWS = [{"x": torch.full((3,), 0.5), "labels": torch.tensor(1.0)} for _ in range(8)]
"""Alike: their order is no matter."""


def arguments(folder: Path, steps: int) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        logging_steps=1,
    )


def trainer(folder: Path, manager: CheckpointManager, steps: int) -> Any:
    from asyncdcp.interop.transformers import AsyncDCPCallback

    torch.manual_seed(0)
    callbacks = [AsyncDCPCallback(manager)]
    return transformers.Trainer(model=Net(), args=arguments(folder, steps), train_dataset=ROWS, callbacks=callbacks)


def test_a_training_resumes_bit_by_bit(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "whole", save_when=EverySteps(5), process=False) as manager:
        whole = trainer(tmp_path, manager, 6)
        whole.train()
        assert manager.steps().result() == [5, 6], "the last step is saved, too"
    with CheckpointManager(tmp_path / "parts", save_when=EverySteps(2), process=False) as manager:
        trainer(tmp_path, manager, 4).train()
        assert manager.steps().result() == [2, 4]
        latest = manager.latest().result()
        assert latest is not None
        assert latest.metrics["loss"] is not None
        assert latest.metrics["logged_step"] == 3
        assert "step" not in latest.metrics
    with CheckpointManager(tmp_path / "parts", save_when=EverySteps(2), process=False) as manager:
        second = trainer(tmp_path, manager, 6)
        second.train()
        assert manager.steps().result() == [2, 4, 6]
    assert torch.equal(second.model.layer.weight, whole.model.layer.weight)
    assert second.state.global_step == 6


def test_the_example_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def few(*, save_strategy: str, max_steps: int) -> Any:
        assert (save_strategy, max_steps) == ("no", 10_000)
        return arguments(tmp_path, 2)

    own = {"Trainer": transformers.Trainer, "TrainingArguments": few, "model": Net(), "data": ROWS}
    exec(
        example("transformers"),
        {"CheckpointManager": CheckpointManager, "KeepLast": KeepLast, "EverySteps": EverySteps, **own},
    )
    with CheckpointManager("runs/bert", read_only=True, process=False) as manager:
        assert manager.steps().result() == [2]
