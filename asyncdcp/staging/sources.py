"""What a save copies: the tensors as they are at the call, and what is known of who may change them meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from asyncdcp.staging.accelerator import DeviceFence, Marks
from asyncdcp.staging.eager import EagerBudget, clone_unguarded
from asyncdcp.staging.guard import Guard, frozen_parameters
from asyncdcp.staging.torn import Witness, versions


class Sources:
    """The tensors of one save, one for each chunk of the plan's structure; taken on the caller's thread.

    With ``guards``, what they do not protect is cloned now, up to the budget, but for parameters without gradient:
    those are not expected to change. ``watched`` are the numbers of the tensors that somebody could change during
    staging, these among them.
    """

    def __init__(
        self, tensors: list[Tensor], guards: Sequence[Guard], statefuls: Iterable[object], budget: EagerBudget
    ) -> None:
        self.tensors = tensors
        self.watched: Iterable[int] = range(len(tensors))
        self._budget = budget
        self._eager = 0
        if guards:
            guarded = [tensor for guard in guards for tensor in guard.tensors()]
            frozen = list(frozen_parameters(iter(statefuls)))
            still = {tensor.data_ptr() for tensor in frozen if not tensor.is_meta}
            exposed, self._eager = clone_unguarded(tensors, [*guarded, *frozen], budget)
            self.watched = exposed | {n for n, tensor in enumerate(tensors) if tensor.data_ptr() in still}
        try:
            self.fence = DeviceFence(tensors)
        except BaseException:  # refused while a graph is captured
            budget.give(self._eager)
            raise
        self._versions = versions(tensors)
        self._marks: Marks = []
        self._passable, self._free = threading.Event(), threading.Event()

    def select(self, picks: Sequence[tuple[int, int, int]]) -> None:
        """Keeps what is to be written: of tensor ``number`` the rows ``begin <= i < end``, of a scalar all."""
        watched = set(self.watched)
        kept = [self.tensors[number] for number, _, _ in picks]
        self._versions = [self._versions[number] for number, _, _ in picks]
        self.watched = [place for place, (number, _, _) in enumerate(picks) if number in watched]
        self.tensors[:] = [
            tensor.detach().narrow(0, begin, end - begin) if tensor.dim() and end - begin != tensor.shape[0] else tensor
            for tensor, (_, begin, end) in zip(kept, picks, strict=True)
        ]

    def witness(self) -> Callable[[], list[int]]:
        """Looks at the watched tensors as copying begins; the result tells which have changed since the save was
        called.
        """
        return Witness(self.tensors, self._versions, self.watched).changed

    def enqueued(self, marks: Marks) -> None:
        """All is copied but for what accelerators have been told to copy, which has been read at ``marks``."""
        self._marks = marks
        self._passable.set()

    def hold(self, timeout: float) -> bool:
        """Blocks until what the calling thread does, or enqueues on its current streams, from now on changes nothing
        that the save still reads; whether that came.

        The streams wait for copies under way there, and the host does not. A stream that is being captured cannot wait
        for anything outside of its graph, so then the host does.
        """
        until = time.monotonic() + timeout
        if not self._passable.wait(timeout):
            return False
        marks = [] if self._free.is_set() else self._marks
        if any(work.capturing() for work, _ in marks):
            return self._free.wait(max(min(until - time.monotonic(), timeout), 0))
        for work, mark in marks:
            work.wait(mark)
        return True

    def drop(self) -> None:
        """Lets go of the tensors: they are copied, or never will be. Safe to call twice."""
        self.tensors.clear()
        self._budget.give(self._eager)
        self._eager = 0
        self._free.set()
        self._passable.set()
