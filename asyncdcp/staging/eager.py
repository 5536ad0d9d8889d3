"""Eager copies: under a guard, what the guarded optimizers do not own is cloned before ``save`` returns, up to a
budget.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
from torch import Tensor


class EagerBudget:
    """Bytes of clones that all pending saves of a checkpointer may hold together. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes held now."""
        return self._used

    def take(self, nbytes: int) -> bool:
        """Whether there was room; equal to the limit is allowed."""
        with self._lock:
            if self._used + nbytes > self._limit:
                return False
            self._used += nbytes
            return True

    def give(self, nbytes: int) -> None:
        """Gives bytes back."""
        with self._lock:
            self._used -= nbytes


def clone_unguarded(sources: list[Tensor], guarded: Iterable[Tensor], budget: EagerBudget) -> tuple[set[int], int]:
    """Replaces in ``sources`` every tensor that no guard protects by a clone, smallest first, as far as the budget
    goes.

    Returns the numbers of the sources that may still be changed while they are staged, which are the largest, and the
    bytes taken from the budget.
    """
    protected = {tensor.data_ptr() for tensor in guarded if not tensor.is_meta}
    rest = [number for number, tensor in enumerate(sources) if tensor.numel() and tensor.data_ptr() not in protected]
    rest.sort(key=lambda number: sources[number].nbytes)
    taken = 0
    exposed: set[int] = set()
    for number in rest:
        nbytes = sources[number].nbytes
        if exposed or not budget.take(nbytes):
            exposed.add(number)
            continue
        taken += nbytes
        try:
            with torch.no_grad():
                sources[number] = sources[number].detach().clone()
        except BaseException:  # no memory, or Control-C
            budget.give(taken)
            raise
    return exposed, taken
