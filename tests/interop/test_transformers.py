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
accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainer's own, about what a tiny one lacks


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x: Any, labels: Any = None) -> dict[str, Any]:
        return {"loss": (self.layer(x).squeeze(-1) - labels).square().mean()}


ROWS = [{"x": torch.full((3,), 0.5), "labels": torch.tensor(1.0)} for _ in range(8)]
"""Alike: their order is no matter."""


def arguments(folder: Path, steps: int, **more: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=0.05,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **{"logging_steps": 1, "per_device_train_batch_size": 2, **more},
    )


def trainer(folder: Path, manager: CheckpointManager, steps: int, **more: Any) -> Any:
    from asyncdcp.interop.transformers import AsyncDCPCallback

    torch.manual_seed(0)
    callbacks = [AsyncDCPCallback(manager)]
    given = arguments(folder, steps, **more)
    return transformers.Trainer(model=Net(), args=given, train_dataset=ROWS, eval_dataset=ROWS, callbacks=callbacks)


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
        assert latest.metrics["learning_rate"] == 0.05
        assert not {"step", "logged_step"} & set(latest.metrics), "of the step itself"
    with CheckpointManager(tmp_path / "parts", save_when=EverySteps(2), process=False) as manager:
        second = trainer(tmp_path, manager, 6)
        second.train()
        assert manager.steps().result() == [2, 4, 6]
    assert torch.equal(second.model.layer.weight, whole.model.layer.weight)
    assert second.state.global_step == 6


@pytest.mark.parametrize(
    "evaluated",
    [
        {"eval_strategy": "steps", "eval_steps": 4, "logging_steps": 4},
        {"eval_strategy": "epoch", "logging_strategy": "epoch"},  # of four steps
        {"eval_strategy": "epoch", "logging_steps": 2},
    ],
)
def test_a_step_is_saved_with_its_own_evaluation(tmp_path: Path, evaluated: dict[str, Any]) -> None:
    with CheckpointManager(tmp_path / "run", save_when=EverySteps(3), process=False) as manager:
        whole = trainer(tmp_path, manager, 8, **evaluated)
        whole.train()
        losses = {entry["step"]: entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry}
        metrics = {at.step: at.metrics for at in manager.checkpoints().result()}
        assert list(metrics) == [3, 6, 8]
        assert metrics[8]["eval_loss"] == losses[8]
        assert metrics[8]["loss"] is not None
        assert "logged_step" not in metrics[8]
        assert "eval_loss" not in metrics[6], "step 4's, and step 6 was not evaluated"
        if evaluated.get("logging_steps") != 2:
            assert metrics[6]["logged_step"] == 4
            assert metrics[3] == {}


def test_a_preempted_training_saves_before_it_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(tmp_path / "run", save_when=EverySteps(1), process=False) as manager:
        monkeypatch.setattr(CheckpointManager, "preempted", property(lambda manager: True))
        trainer(tmp_path, manager, 8, eval_strategy="steps", eval_steps=1).train()
        assert [at.metrics for at in manager.checkpoints().result()] == [{}]


def test_a_step_that_an_epoch_does_not_log_again_is_saved(tmp_path: Path) -> None:
    """It waited for a log that did not come; a training's last step was lost so."""
    epochs = {"per_device_train_batch_size": 8, "logging_strategy": "epoch", "logging_first_step": True}
    for steps in (1, 2):
        with CheckpointManager(tmp_path / f"{steps}", save_when=EverySteps(1), process=False) as manager:
            trainer(tmp_path, manager, steps, **epochs).train()
            assert manager.steps().result() == [1, 2][:steps]


class Noisy(Net):
    def forward(self, x: Any, labels: Any = None) -> dict[str, Any]:
        return super().forward(torch.nn.functional.dropout(x, 0.5, self.training), labels)


DIFFERENT = [{"x": torch.full((3,), float(row)), "labels": torch.tensor(1.0)} for row in range(10)]
"""Their order is seen in the losses; an epoch is two steps of two batches, and one of one."""


def resumable(folder: Path, manager: CheckpointManager, steps: int, eval_steps: int = 2) -> tuple[Any, Any]:
    from asyncdcp.interop.transformers import AsyncDCPCallback

    torch.manual_seed(0)
    callback = AsyncDCPCallback(manager)
    given = arguments(folder, steps, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=eval_steps)
    rows = {"train_dataset": DIFFERENT, "eval_dataset": DIFFERENT}
    return callback, transformers.Trainer(model=Noisy(), args=given, callbacks=[callback], **rows)


def losses(trainer: Any) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@pytest.mark.parametrize("cut", [3, 4], ids=["at an epoch's end", "in an epoch"])
def test_train_goes_on_in_the_middle_of_the_data(tmp_path: Path, cut: int) -> None:
    with CheckpointManager(tmp_path / "whole", process=False) as manager:
        callback, whole = resumable(tmp_path, manager, 8, eval_steps=cut)
        callback.train(whole)
    with CheckpointManager(tmp_path / "parts", process=False) as manager:
        callback, first = resumable(tmp_path, manager, cut, eval_steps=cut)
        callback.train(first)
    with CheckpointManager(tmp_path / "parts", process=False) as manager:
        callback, second = resumable(tmp_path, manager, 8, eval_steps=cut)
        callback.train(second)
    assert losses(second) == losses(whole), "the same batches, dropped out alike, and the first loss is no average"
    assert second.state.epoch == whole.state.epoch
    assert torch.equal(second.model.layer.weight, whole.model.layer.weight)
    assert "_load_from_checkpoint" not in vars(second), "it is the trainer's own again"


def test_the_scale_of_gradients_is_restored(tmp_path: Path) -> None:
    from asyncdcp.interop.transformers import AsyncDCPCallback

    def begin(manager: CheckpointManager, scale: float) -> tuple[Any, torch.amp.GradScaler]:
        model = Net()
        optimizer = torch.optim.SGD(model.parameters())
        wrapped = accelerate.Accelerator(cpu=True).prepare(optimizer)
        wrapped.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        control, state = transformers.TrainerControl(), transformers.TrainerState(global_step=1, max_steps=1)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        callback = AsyncDCPCallback(manager)
        given = (arguments(tmp_path, 1), state, control)
        callback.on_train_begin(*given, model=model, optimizer=wrapped, lr_scheduler=scheduler)
        return lambda: callback.on_step_end(*given), wrapped.scaler

    with CheckpointManager(tmp_path / "run", process=False) as manager:
        step, _ = begin(manager, 8.0)
        step()
    with CheckpointManager(tmp_path / "run", process=False) as manager:
        assert begin(manager, 2.0)[1].state_dict()["scale"] == 8.0


def test_per_rank_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from asyncdcp.interop.transformers import AsyncDCPCallback

    asked: list[str] = []
    own = CheckpointManager.restore_latest

    def restore_latest(manager: CheckpointManager, state: Any, *, per_rank: Any, **options: Any) -> Any:
        asked.append(per_rank)
        return own(manager, state, per_rank=per_rank, **options)

    monkeypatch.setattr(CheckpointManager, "restore_latest", restore_latest)
    with CheckpointManager(tmp_path / "run", process=False) as manager:
        callback = AsyncDCPCallback(manager, per_rank="drop")
        callback.train(transformers.Trainer(Net(), arguments(tmp_path, 1), train_dataset=ROWS, callbacks=[callback]))
    assert asked == ["drop", "drop"], "the progress, and the rest"


def test_train_of_a_run_that_was_finished_restores_it(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run", process=False) as manager:
        callback, first = resumable(tmp_path, manager, 4)
        callback.train(first)
        callback, second = resumable(tmp_path, manager, 4)
        assert callback.train(second).global_step == 4
        assert torch.equal(second.model.layer.weight, first.model.layer.weight)
        second.evaluate()
        assert manager.steps().result() == [4]


def test_train_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run", save_when=EverySteps(2), process=False) as manager:
        callback, whole = resumable(tmp_path, manager, 6)
        callback.train(whole)
    (data,) = (tmp_path / "run" / "step_6").glob("*.safetensors")
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    with CheckpointManager(tmp_path / "run", save_when=EverySteps(100), process=False) as manager:
        callback, second = resumable(tmp_path, manager, 7)
        callback.train(second)
        assert {step: loss for step, loss in losses(second).items() if step <= 6} == losses(whole)
        assert second.state.global_step == 7


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
