"""What a receive comes to: a new state, or one that is there; as a load, of what another rank offers."""

from __future__ import annotations

from operator import eq
from typing import Any, TypeAlias

import msgspec
import torch
from torch import Tensor

from asyncdcp.errors import CorruptCheckpoint
from asyncdcp.metadata import TensorStorageMetadata
from asyncdcp.state_dict.flatten import FlatState
from asyncdcp.state_dict.matching import Match, match, shares_memory
from asyncdcp.state_dict.nodes import TreeNodes
from asyncdcp.state_dict.options import LoadOptions
from asyncdcp.state_dict.restoring import Restorer
from asyncdcp.state_dict.structure import DTYPE_NAMES
from asyncdcp.state_dict.targets import new_tensors
from asyncdcp.state_dict.unflatten import unflatten
from asyncdcp.transport.offered import Offered
from asyncdcp.transport.wire import StreamPlan

Targets: TypeAlias = list[tuple[str, Tensor]]
"""Names of the offer, and the tensors that are to hold their content."""


class Anew:
    """A new state of CPU tensors."""

    def __init__(self) -> None:
        self._state: Any = None

    def bind(self, offered: Offered) -> Targets:
        """Makes the state, its tensors still without content."""
        metadata = offered.metadata
        tree, values = decoded(offered)
        entries = metadata.state_dict_metadata.items()
        tensors = new_tensors(
            metadata, {name: torch.device("cpu") for name, entry in entries if isinstance(entry, TensorStorageMetadata)}
        )
        ties = {alias: tensors[name] for alias, name in metadata.aliases.items()}
        self._state = unflatten(tree, {**tensors, **ties}, values)
        return list(tensors.items())

    def finish(self) -> Any:
        """The state."""
        return self._state


class InPlace:
    """A state that is there, flattened as ``flat``."""

    def __init__(self, state: Any, flat: FlatState) -> None:
        self._state = state
        self._flat = flat
        self._restorer: Restorer | None = None

    def bind(self, offered: Offered) -> Targets:
        """Matches the state with what is offered; ``StateMismatch`` otherwise."""
        options, flat = LoadOptions(given=False), self._flat
        tree, values = decoded(offered)
        if is_alike(flat, offered.layout.plan, tree, values):
            if values or flat.statefuls:
                nodes = TreeNodes(tree, options.renamed)
                self._restorer = Restorer(flat, identity(flat), nodes, values, options)
            return list(flat.tensors.items())
        nodes = TreeNodes(tree, options.renamed)
        found = match(flat, offered.metadata, nodes, options)
        made = new_tensors(offered.metadata, found.fresh, found.alike)
        found.add_fresh(made)
        self._restorer = Restorer(flat, found, nodes, values, options)
        return [*found.fill, *made.items()]

    def finish(self) -> Any:
        """Plain values, and every Stateful's ``load_state_dict``, in the state's order."""
        return self._state if self._restorer is None else self._restorer.restore(self._state)


# ── a state just as the sender's, as replicas have it: nothing is to be matched ─────────────────────────────────────


def is_alike(flat: FlatState, plan: StreamPlan, tree: Any, values: dict[str, Any]) -> bool:
    """Whether names, dtypes, shapes, ties and containers are all the same, and every tensor can be filled."""
    tensors = flat.tensors.values()
    return (
        not flat.subclasses
        and list(flat.tensors) == plan.names
        and [DTYPE_NAMES.get(tensor.dtype) for tensor in tensors] == plan.dtypes
        and all(map(eq, (tensor.shape for tensor in tensors), plan.shapes))
        and flat.aliases == plan.aliases
        and flat.values.keys() == values.keys()
        and bool(flat.tree == tree)
        and not any(tensor.is_meta or shares_memory(tensor) for tensor in tensors)
    )


def identity(flat: FlatState) -> Match:
    """What matching would find."""
    tensors = {**flat.tensors, **{alias: flat.tensors[name] for alias, name in flat.aliases.items()}}
    others = (fqn for fqn, taken in flat.statefuls.items() if not isinstance(taken.stateful, torch.nn.Module))
    return Match({name: name for name in (*tensors, *flat.values)}, tensors=tensors, deciding=frozenset(others))


def decoded(offered: Offered) -> tuple[Any, dict[str, Any]]:
    """Tree and values, as JSON says them; not trusted yet."""
    try:
        values = {name: msgspec.json.decode(value) for name, value in offered.values.items()}
        return offered.layout.tree, values
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"the offer of rank {offered.rank} is malformed: {error!s:.200}") from error
