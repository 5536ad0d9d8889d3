"""When to save: policies that decide by step, by time, at preemption, or as the program likes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from asyncdcp.errors import InvalidOption


class Moment(NamedTuple):
    """What a policy decides by: the step, seconds since the last save was called (or the run was opened), and whether
    the process was asked to end.
    """

    step: int
    seconds: float
    preempted: bool


@runtime_checkable
class SavePolicy(Protocol):
    """Decides when to save. ``by_step`` says that the step alone decides: then each rank decides by itself, and alike.

    Any other policy is asked on rank 0 only, and what it says goes, on all ranks, for a step soon after.
    """

    @property
    def by_step(self) -> bool: ...

    def due(self, moment: Moment) -> bool:
        """Whether to save now."""
        ...


@dataclass(frozen=True)
class EverySteps:
    """At every step that is a multiple of ``steps``.

    >>> from asyncdcp.manager import Moment
    >>> [step for step in range(1, 31) if asyncdcp.EverySteps(10).due(Moment(step, seconds=0.0, preempted=False))]
    [10, 20, 30]
    """

    steps: int
    by_step = True

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise InvalidOption(f"EverySteps takes a whole number from 1 up, not {self.steps!r}")

    def due(self, moment: Moment) -> bool:
        """Whether the step is such a multiple."""
        return moment.step % self.steps == 0


@dataclass(frozen=True)
class EverySeconds:
    """Once ``seconds`` have passed since the last save was called."""

    seconds: float
    by_step = False

    def __post_init__(self) -> None:
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, (int, float)) or not self.seconds > 0:
            raise InvalidOption(f"EverySeconds takes a positive number of seconds, not {self.seconds!r}")

    def due(self, moment: Moment) -> bool:
        """Whether they have passed."""
        return moment.seconds >= self.seconds


@dataclass(frozen=True)
class OnPreemption:
    """Once, when one of the signals came that Slurm and Kubernetes send before they end a job.

    With it the manager takes these signals over while it is open, which only the main thread can do; handlers that
    were there are called too, and come back once it is closed. ``manager.preempted`` turns true at the step of that
    save. A save that is not durable ``deadline`` seconds after the signal is given up, so that the process ends in
    time. A program that has not even asked ``should_save`` by then is ended by the signal, as it would have been
    without this, and so is one to which another of these signals comes after that. One that comes after the last
    ``should_save``, or while the manager closes, ends the program once it is closed, and at the latest ``deadline``
    seconds after. Give more seconds where steps take long.
    """

    signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGUSR1)
    deadline: float = 30.0
    by_step = False

    def __post_init__(self) -> None:
        given = self.signals
        if not isinstance(given, Collection) or not given or not all(map(_can_be_heard, given)):
            raise InvalidOption(
                f"OnPreemption takes signals that a program can handle, such as (signal.SIGTERM,), not {given!r}"
            )
        if isinstance(self.deadline, bool) or not isinstance(self.deadline, (int, float)) or not self.deadline > 0:
            raise InvalidOption(f"OnPreemption takes a positive deadline in seconds, not {self.deadline!r}")

    def due(self, moment: Moment) -> bool:
        """Whether such a signal came."""
        return moment.preempted


def _can_be_heard(number: object) -> bool:
    return isinstance(number, int) and number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}


@dataclass(frozen=True)
class When:
    """When the program's own function of the ``Moment`` says so."""

    function: Callable[[Moment], bool]
    by_step = False

    def due(self, moment: Moment) -> bool:
        """What the function says."""
        return bool(self.function(moment))


SaveWhen: TypeAlias = SavePolicy | Callable[[Moment], bool] | Sequence[SavePolicy | Callable[[Moment], bool]]
"""One policy or several, of which any may decide to save; a function of the ``Moment`` is one, too."""


def check_policies(given: SaveWhen) -> tuple[SavePolicy, ...]:
    """The policies, or ``InvalidOption``."""
    several = given if isinstance(given, (list, tuple)) else [given]
    return tuple(_policy(each) for each in several)


def _policy(given: object) -> SavePolicy:
    if isinstance(given, SavePolicy) and not isinstance(given, type):
        return given
    if callable(given) and not isinstance(given, type):
        return When(given)
    raise InvalidOption(f"save_when takes policies such as EverySteps(1000), or functions of a Moment, not {given!r}")
