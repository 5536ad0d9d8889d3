"""A callback for ``transformers.Trainer`` that saves and restores by a ``CheckpointManager``. Imports transformers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from asyncdcp.manager import CheckpointManager
from asyncdcp.staging import Guard
from asyncdcp.stateful import RNGState


class AsyncDCPCallback(TrainerCallback):
    """Saves model, optimizer, scheduler, random generators and the trainer's progress while training goes on.

        manager = CheckpointManager("runs/bert", keep=KeepLast(3), save_when=EverySteps(500))
        trainer = Trainer(…, args=TrainingArguments(save_strategy="no", …), callbacks=[AsyncDCPCallback(manager)])

    The manager's ``save_when`` says when, which is every ten minutes if nothing is given; the last step that the
    arguments ask for is always saved. ``save_strategy="no"`` keeps the trainer from saving for itself beside it.

    When training begins, the newest checkpoint of the manager's run is restored, with ``restore=False`` none, and
    training goes on at its step. The optimizer is guarded: its step waits until pending saves have copied what it
    changes. The last saves are durable, and what failed is raised, when training ends. The manager is the caller's to
    close.

    The trainer begins its data and its epochs anew after a restore: a dataset that is to go on where it was keeps its
    own position. The first loss that it logs then is divided by all steps, those before the restore too. It always
    makes a step before it looks whether to stop: a run that had reached its last step already is trained one step
    more, which is not saved.
    """

    def __init__(self, manager: CheckpointManager, *, restore: bool = True) -> None:
        self._manager = manager
        self._restore = restore
        self._state: dict[str, Any] = {}
        self._guard: Guard | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restores, and guards the optimizer."""
        optimizer = _inner(kwargs["optimizer"], "optimizer")
        self._state = {
            "model": kwargs["model"],
            "optimizer": optimizer,
            "scheduler": _inner(kwargs["lr_scheduler"], "scheduler"),
            "rng": RNGState(),
            "trainer": _Progress(state),
        }
        if self._restore:
            self._manager.restore_latest(self._state).result()
        self._guard = self._manager.guard(optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves if it is time, or the last step; ends the training if the process is asked to end."""
        due = self._manager.should_save(state.global_step)
        if due or state.global_step == state.max_steps:
            self._manager.save(state.global_step, self._state, metrics=_metrics(state))
        if self._manager.preempted:
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Waits until all saves are durable; raises what failed."""
        if self._guard is not None:
            self._guard.remove()
        self._state = {}
        self._manager.wait().result()


class _Progress:
    """The part of a ``TrainerState`` that a resumed training goes on from."""

    def __init__(self, state: TrainerState) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        state = self._state
        return {"global_step": state.global_step, "epoch": state.epoch, "log_history": list(state.log_history)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for name, value in saved.items():
            setattr(self._state, name, value)


def _inner(wrapped: Any, name: str) -> Any:
    """What accelerate has wrapped, or the thing itself."""
    return getattr(wrapped, name, wrapped) if type(wrapped).__module__.startswith("accelerate") else wrapped


def _metrics(state: TrainerState) -> dict[str, float]:
    """The numbers of the last log, and as ``logged_step`` at which step that was: before the one that is saved."""
    last = state.log_history[-1] if state.log_history else {}
    found = {name: float(value) for name, value in last.items() if isinstance(value, (int, float))}
    return {"logged_step" if name == "step" else name: value for name, value in found.items()}
