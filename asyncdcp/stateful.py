"""What a state may hold besides tensors and plain values: ``Stateful`` objects, and marks for what differs by rank."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch

from asyncdcp.errors import StateMismatch

_T = TypeVar("_T")


@runtime_checkable
class Stateful(Protocol):
    """Anything that gives its state as a dict and takes it back: modules, optimizers, schedulers, data loaders.

    >>> isinstance(torch.nn.Linear(2, 1), asyncdcp.Stateful)
    True
    """

    def state_dict(self) -> Any:
        """The state as tensors, plain values, containers and further Statefuls."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take over a state that ``state_dict()`` gave, perhaps in another process."""


def is_stateful(value: object) -> bool:
    """Whether ``value`` has both methods of a ``Stateful``, and is no class of such. On every Python those count that
    ``__getattr__`` gives, as a wrapper does that passes all on; ``isinstance`` sees none of these from 3.12 on. At a
    fifth of its cost, which a state's every plain value pays.
    """
    return (
        callable(getattr(value, "load_state_dict", None))
        and callable(getattr(value, "state_dict", None))
        and not isinstance(value, type)
    )


@dataclass(slots=True)
class PerRank(Generic[_T]):
    """Marks ``value`` (a value, container or Stateful) as one that each rank has for itself.

    Every rank saves and loads its own under the same name; nothing of it is compared with or spread over other ranks.
    An in-place load replaces ``value``, or calls its ``load_state_dict``.

    >>> state = {"data": asyncdcp.PerRank({"position": 7})}
    >>> with asyncdcp.SyncCheckpointer(process=False) as checkpointer:
    ...     _ = checkpointer.save("per_rank", state)
    ...     state["data"].value = {"position": 0}
    ...     print(checkpointer.load("per_rank", state))
    {'data': PerRank(value={'position': 7})}
    """

    value: _T


class RNGState:
    """The process's global random number generators as a Stateful; it holds nothing itself and is per rank by nature.

    ``state_dict()`` reads, at the call, torch's CPU generator, the default generators of all devices of the current
    accelerator (``torch.accelerator``), Python's ``random``, and numpy's global generator where numpy is loaded. It
    moves none of them. After ``load_state_dict`` each of them continues exactly as it would have. Generators that the
    state does not have, and devices that are not there, are left alone; generators that users made are not included.

    >>> before = asyncdcp.RNGState().state_dict()
    >>> drawn = torch.rand(3)
    >>> asyncdcp.RNGState().load_state_dict(before)
    >>> torch.equal(torch.rand(3), drawn)
    True
    """

    def state_dict(self) -> dict[str, Any]:
        """Copies, independent of the generators: tensors (uint8, CPU) and plain values."""
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        accelerator = _accelerator()
        if accelerator is not None:
            kind, count = accelerator
            module = torch.get_device_module(kind)
            state["accelerator"] = {kind: [module.get_rng_state(index) for index in range(count)]}
        if sys.modules.get("numpy") is not None:
            import numpy.random

            state["numpy"] = numpy.random.get_state(legacy=False)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set the generators. Raises ``StateMismatch``, before any is set, where torch's or Python's is missing."""
        missing = [name for name in ("torch", "python") if name not in state_dict]
        if missing:
            raise StateMismatch(f"RNGState: the state lacks {', '.join(missing)}", missing=missing)
        torch.set_rng_state(state_dict["torch"].cpu())
        random.setstate(state_dict["python"])
        here = _accelerator()
        for kind, states in state_dict.get("accelerator", {}).items():
            if here is None or here[0] != kind:
                continue
            module = torch.get_device_module(kind)
            for index, generator_state in enumerate(states[: here[1]]):
                module.set_rng_state(generator_state.cpu(), index)
        if "numpy" in state_dict:
            import numpy.random

            numpy.random.set_state(state_dict["numpy"])


def _accelerator() -> tuple[str, int] | None:
    """Kind and number of this process's accelerator devices; None without any."""
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    return None if device is None else (device.type, torch.accelerator.device_count())
