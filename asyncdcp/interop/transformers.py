"""A callback for ``transformers.Trainer`` that saves and restores by a ``CheckpointManager``. Imports transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from asyncdcp.manager import CheckpointManager
from asyncdcp.pipeline.descriptions import OtherWorld
from asyncdcp.staging import Guard
from asyncdcp.stateful import RNGState


class AsyncDCPCallback(TrainerCallback):
    """Saves model, optimizer, scheduler, random generators, the trainer's progress and, for fp16, the gradients' scale,
    while training goes on.

        manager = CheckpointManager("runs/bert", keep=KeepLast(3), save_when=EverySteps(500))
        callback = AsyncDCPCallback(manager)
        trainer = Trainer(…, args=TrainingArguments(save_strategy="no", …), callbacks=[callback])
        callback.train(trainer)

    The manager's ``save_when`` says when, which is every ten minutes if nothing is given; the last step that the
    arguments ask for is always saved. A step that is logged or evaluated is saved after that, and its metrics are a
    checkpoint's own, so that ``KeepBest("eval_loss", 1)`` keeps what was evaluated; of another step only the last
    training log is given, with its ``logged_step``. ``save_strategy="no"`` keeps the trainer from saving for itself
    beside it.

    When training begins, the newest checkpoint of the manager's run is restored, with ``restore=False`` none, and
    training goes on at its step. The optimizer is guarded: its step waits until pending saves have copied what it
    changes. The last saves are durable, and what failed is raised, when training ends. The manager is the caller's to
    close. On another number of ranks than at the save, ``per_rank`` says what becomes of the random generators, as in
    ``restore_latest``.

    ``train`` goes on with data and epochs, too. The trainer's own ``train()`` begins them anew after a restore, divides
    the first loss that it logs then by all steps, those before the restore too, and trains a run that had reached its
    last step already one step more, which is not saved.
    """

    def __init__(self, manager: CheckpointManager, *, restore: bool = True, per_rank: OtherWorld = "error") -> None:
        self._manager = manager
        self._restore = partial(manager.restore_latest, per_rank=per_rank) if restore else None
        self._state: dict[str, Any] = {}
        self._guard: Guard | None = None
        self._due = False  # the step is to be saved, after what the trainer still does at it
        self._epoch_closes = False  # which it may log and evaluate then, at the same step
        self._begun_at = 0  # the step that ``train`` told the trainer to go on at
        self._rng: dict[str, Any] = {}  # the generators, as restored

    def train(self, trainer: Trainer, **options: Any) -> TrainOutput:
        """``trainer.train()``, which goes on where the newest checkpoint of the run was made: in the middle of an
        epoch, with the batches that it had not seen, as the trainer's own ``resume_from_checkpoint=`` does. A run that
        had reached its last step is restored and not trained, and the output has no metrics.

        ``options`` are those of ``trainer.train``. The trainer's ``ignore_data_skip`` is heeded. Not with DeepSpeed.
        """
        at = _fresh(trainer.args)
        if self._restore:
            self._restore({"trainer": _Progress(at)}, keys=["trainer.*"]).result()
        while at.global_step:
            with TemporaryDirectory() as folder, self._going_on(trainer, at.global_step):
                at.save_to_json(os.path.join(folder, "trainer_state.json"))
                try:
                    return trainer.train(resume_from_checkpoint=folder, **options)
                except _NotFromHere as found:
                    at = found.state
                    if found.finished:
                        trainer.is_in_train = False
                        return TrainOutput(at.global_step, 0.0, {})
        return trainer.train(**options)

    @contextmanager
    def _going_on(self, trainer: Any, step: int) -> Iterator[None]:
        """The trainer reads its progress, and no other file: the rest is restored when training begins."""
        self._begun_at = step
        trainer._load_from_checkpoint = lambda *_, **__: None
        trainer._load_rng_state = lambda *_: RNGState().load_state_dict(self._rng)  # it has skipped batches before
        try:
            yield
        finally:
            self._begun_at = 0
            del trainer._load_from_checkpoint, trainer._load_rng_state

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restores, and guards the optimizer."""
        wrapped = kwargs["optimizer"]
        optimizer = _inner(wrapped, "optimizer")
        self._state = {
            "model": kwargs["model"],
            "optimizer": optimizer,
            "scheduler": _inner(kwargs["lr_scheduler"], "scheduler"),
            "rng": RNGState(),
            "trainer": _Progress(state),
        }
        if wrapped is not optimizer and wrapped.scaler is not None:  # for fp16
            self._state["scaler"] = wrapped.scaler
        if self._restore:
            self._restore(self._state).result()
        if self._begun_at and (self._begun_at != state.global_step or state.global_step >= state.max_steps):
            raise _NotFromHere(args, state)
        # An interval may be a share of all steps, and how many these are is known only now.
        state.compute_steps(args, state.max_steps)  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        self._rng = RNGState().state_dict()
        self._guard = self._manager.guard(optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves if it is time, or the last step; ends the training if the process is asked to end."""
        self._due = self._manager.should_save(state.global_step) or state.global_step == state.max_steps
        if self._manager.preempted:
            control.should_training_stop = True
            self._save(state)  # there is no time for an evaluation
        over = control.should_training_stop or float(state.epoch or 0).is_integer()
        self._epoch_closes = over and "epoch" in (args.eval_strategy, args.logging_strategy)
        self._save_if_nothing_follows(state, control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves what was due at this step, unless it is evaluated, too."""
        self._save_if_nothing_follows(state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves what was due at this step. Of several sets to evaluate on, that is after the first."""
        self._save_if_nothing_follows(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Saves what was due at this step, unless the epoch is logged or evaluated."""
        self._epoch_closes = False
        self._save_if_nothing_follows(state, control)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Saves what was due at the last step, if the trainer has not logged it again at the end of the epoch."""
        self._save(state)

    def _save_if_nothing_follows(self, state: TrainerState, control: TrainerControl) -> None:
        if not (control.should_log or control.should_evaluate or self._epoch_closes):
            self._save(state)

    def _save(self, state: TrainerState) -> None:
        if self._due:
            self._due = False
            self._manager.save(state.global_step, self._state, metrics=_metrics(state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Waits until all saves are durable; raises what failed."""
        self._save(state)
        if self._guard is not None:
            self._guard.remove()
        self._state = {}
        self._manager.wait().result()


class _NotFromHere(Exception):
    """Never seen outside. Ends a training that is not to go on from the step that it was begun at: that checkpoint was
    passed over, since it is damaged, and ``state`` says where the older one was; or the run is ``finished``.
    """

    def __init__(self, arguments: TrainingArguments, state: TrainerState) -> None:
        super().__init__()
        self.finished = state.global_step >= state.max_steps
        self.state = _fresh(arguments)
        _Progress(self.state).load_state_dict(_Progress(state).state_dict())


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


def _fresh(arguments: TrainingArguments) -> TrainerState:
    """A state that nothing is compared with but the arguments themselves."""
    given = ("train_batch_size", "logging_steps", "eval_steps", "save_steps")
    return TrainerState(**{name: getattr(arguments, name) for name in given})


def _inner(wrapped: Any, name: str) -> Any:
    """What accelerate has wrapped, or the thing itself."""
    return getattr(wrapped, name, wrapped) if type(wrapped).__module__.startswith("accelerate") else wrapped


def _metrics(state: TrainerState) -> dict[str, float]:
    """The numbers that were logged at this step, or else those of the last training log, and as ``logged_step`` at
    which step that was.
    """
    newest_first = list(reversed(state.log_history))
    of_this_step = [entry for entry in newest_first if entry.get("step") == state.global_step]
    found = of_this_step or [entry for entry in newest_first if "loss" in entry][:1]
    numbers = {
        name: float(value) for entry in found for name, value in entry.items() if isinstance(value, (int, float))
    }
    step = numbers.pop("step", state.global_step)
    return numbers if step == state.global_step else {**numbers, "logged_step": step}
