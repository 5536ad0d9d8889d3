"""Which checkpoints are kept: policies that compose, and the decision what to delete. Pure; nothing here does I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from asyncdcp.errors import InvalidOption
from asyncdcp.runs.listing import Checkpoint, Mode, by_metric


@runtime_checkable
class Retention(Protocol):
    """Chooses what to keep. Anything with this method will do; those here also combine with ``|`` and ``&``."""

    def keeps(self, checkpoints: Sequence[Checkpoint]) -> set[int]:
        """The steps to keep, of good checkpoints in the order of their steps."""
        ...


class _Composable:
    """``a | b`` keeps what either does, ``a & b`` what both do."""

    def keeps(self, checkpoints: Sequence[Checkpoint]) -> set[int]:
        """The steps to keep, of good checkpoints in the order of their steps."""
        raise NotImplementedError

    def __or__(self, other: Retention) -> AnyOf:
        return AnyOf(self, other)

    def __and__(self, other: Retention) -> AllOf:
        return AllOf(self, other)


@dataclass(frozen=True)
class KeepLast(_Composable):
    """Keeps the newest ``n``.

    >>> from asyncdcp.runs import Checkpoint
    >>> losses = {10: 5.0, 20: 3.0, 30: 1.0, 40: 2.0, 50: 4.0}
    >>> run = [
    ...     Checkpoint(name=f"step_{step}", step=step, state="committed", metrics={"loss": loss})
    ...     for step, loss in losses.items()
    ... ]
    >>> keep = asyncdcp.KeepLast(1) | asyncdcp.KeepBest("loss") | asyncdcp.KeepEvery(20)
    >>> sorted(keep.keeps(run))
    [20, 30, 40, 50]
    """

    n: int

    def __post_init__(self) -> None:
        _check_count("KeepLast", self.n)

    def keeps(self, checkpoints: Sequence[Checkpoint]) -> set[int]:
        return {checkpoint.step for checkpoint in checkpoints[-self.n :]}


@dataclass(frozen=True)
class KeepBest(_Composable):
    """Keeps the ``n`` whose ``metric`` is the least, or with ``mode="max"`` the greatest; those without it are not."""

    metric: str
    n: int = 1
    mode: Mode = "min"

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise InvalidOption(f"KeepBest takes the name of a metric, as in KeepBest('loss', 2), not {self.metric!r}")
        _check_count("KeepBest", self.n)
        by_metric((), self.metric, self.mode)  # checks the mode

    def keeps(self, checkpoints: Sequence[Checkpoint]) -> set[int]:
        return {checkpoint.step for checkpoint in by_metric(checkpoints, self.metric, self.mode)[: self.n]}


@dataclass(frozen=True)
class KeepEvery(_Composable):
    """Keeps every step that is a multiple of ``steps``."""

    steps: int

    def __post_init__(self) -> None:
        _check_count("KeepEvery", self.steps)

    def keeps(self, checkpoints: Sequence[Checkpoint]) -> set[int]:
        return {checkpoint.step for checkpoint in checkpoints if checkpoint.step % self.steps == 0}


class AnyOf(_Composable):
    """Keeps what any of the policies keeps."""

    def __init__(self, *policies: Retention) -> None:
        self.policies = _checked("AnyOf", policies)

    def keeps(self, checkpoints: Sequence[Checkpoint]) -> set[int]:
        return set[int]().union(*(policy.keeps(checkpoints) for policy in self.policies))

    def __repr__(self) -> str:
        return f"AnyOf({', '.join(map(repr, self.policies))})"


class AllOf(_Composable):
    """Keeps what all of the policies keep."""

    def __init__(self, *policies: Retention) -> None:
        self.policies = _checked("AllOf", policies)

    def keeps(self, checkpoints: Sequence[Checkpoint]) -> set[int]:
        return set.intersection(*(policy.keeps(checkpoints) for policy in self.policies))

    def __repr__(self) -> str:
        return f"AllOf({', '.join(map(repr, self.policies))})"


def check_retention(option: str, policy: object) -> Retention:
    """The policy itself if it is one, else ``InvalidOption``."""
    if not isinstance(policy, Retention) or isinstance(policy, type):
        raise InvalidOption(f"{option} takes a policy such as KeepLast(3), not {policy!r}")
    return policy


def to_delete(policy: Retention, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints that may go, oldest first.

    Only good ones are looked at: what is off the line, damaged or not committed is no business of retention. The newest
    good one always stays, whatever the policy says.
    """
    good = sorted((checkpoint for checkpoint in checkpoints if checkpoint.good), key=lambda each: each.step)
    if not good:
        return []
    kept = {*policy.keeps(good), good[-1].step}
    return [checkpoint for checkpoint in good if checkpoint.step not in kept]


def _check_count(name: str, number: object) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise InvalidOption(f"{name} takes a whole number from 1 up, not {number!r}")


def _checked(name: str, policies: tuple[Retention, ...]) -> tuple[Retention, ...]:
    if not policies:
        raise InvalidOption(f"{name} takes at least one policy")
    return tuple(check_retention(name, policy) for policy in policies)
