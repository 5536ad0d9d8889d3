"""Guards: an optimizer's ``step`` waits until the tensors that it is about to change have been copied, and nothing else
does; what its tensors are not is cloned before ``save`` returns, up to a budget.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from asyncdcp.errors import InvalidOption


class Guard:
    """Holds optimizers back while their tensors are being staged. Made by ``AsyncCheckpointer.guard``.

    Under a guard the optimizers' parameters and states cannot change while a save copies them: ``step`` waits until all
    is copied. What is on an accelerator need only be enqueued there: from then on the current streams wait for it, and
    the host goes on. So it does for parameters that are stepped in the backward pass, by optimizers of their own, if
    all of these are guarded. A step that is captured in a CUDA graph and replayed runs no hook: wait with
    ``wait_staged()`` before the replay.

    ``remove()`` ends it; a context manager does so on exit. ``waited`` is how many seconds steps have waited in all.
    """

    def __init__(self, optimizers: tuple[Any, ...], wait: Callable[[], None]) -> None:
        self._optimizers = [_hooked(optimizer) for optimizer in optimizers]
        self._wait = wait
        self._handles = [optimizer.register_step_pre_hook(self._before_step) for optimizer in self._optimizers]
        self.waited = 0.0

    def _before_step(self, *_: object) -> None:
        begun = time.perf_counter()
        self._wait()
        self.waited += time.perf_counter() - begun

    @property
    def active(self) -> bool:
        """Whether it has not been removed."""
        return bool(self._handles)

    def remove(self) -> None:
        """Lets the optimizers step freely again; safe to call twice. A save under way is no longer protected."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def tensors(self) -> Iterator[Tensor]:
        """What the optimizers change: their parameters and the tensors of their states, as they are now."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield from plain_tensors(parameter)
            for state in optimizer.state.values():
                if isinstance(state, dict):
                    for value in state.values():
                        if isinstance(value, Tensor):
                            yield from plain_tensors(value)


def _hooked(optimizer: Any) -> Any:
    """The optimizer whose ``step`` runs hooks: itself, or what a wrapper without any (accelerate's) has inside."""
    inner = optimizer
    while isinstance(inner, torch.optim.Optimizer) and not hasattr(inner, "_optimizer_step_pre_hooks"):
        inner = getattr(inner, "optimizer", None)  # its __init__ was left out: register_step_pre_hook would fail
    if not callable(getattr(inner, "register_step_pre_hook", None)):
        kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        raise InvalidOption(
            f"guard cannot hold back a {kind}: it has no register_step_pre_hook, as torch.optim.Optimizer has; "
            "wait for staged, or call wait_staged(), before it changes tensors"
        )
    return inner


def frozen_parameters(statefuls: Iterator[object]) -> Iterator[Tensor]:
    """The parameters of modules that take no gradient, so that no optimizer changes them. Others may: averaged weights
    and target networks are updated by hand.
    """
    for stateful in statefuls:
        if isinstance(stateful, torch.nn.Module):
            for parameter in stateful.parameters():
                if not parameter.requires_grad:
                    yield from plain_tensors(parameter)


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a tensor's memory: itself, or what a subclass says that it consists of."""
    if not hasattr(type(tensor), "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]  # just looked for
        part = getattr(tensor, name)
        if isinstance(part, Tensor):  # a DTensor names its mesh, too
            yield from plain_tensors(part)


class EagerBudget:
    """Bytes of clones that all pending saves of a checkpointer may hold together. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._lock = threading.RLock()  # as the checkpointer's

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
