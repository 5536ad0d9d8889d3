"""Guards: an optimizer's ``step`` waits until the tensors that it is about to change have been copied, and nothing else
does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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
        for optimizer in optimizers:
            if not callable(getattr(optimizer, "register_step_pre_hook", None)):
                kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
                raise InvalidOption(
                    f"guard cannot hold back a {kind}: it has no register_step_pre_hook, as torch.optim.Optimizer has; "
                    "wait for staged, or call wait_staged(), before it changes tensors"
                )
        self._optimizers = optimizers
        self._wait = wait
        self._handles = [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]
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
