"""What a receive comes to: a new state, or one that is there; as a load, of what another rank offers."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from torch import Tensor

from asyncdcp.boxes import whole
from asyncdcp.errors import CorruptCheckpoint
from asyncdcp.metadata import TensorStorageMetadata
from asyncdcp.planning import Want
from asyncdcp.state_dict.chunks import local_chunks
from asyncdcp.state_dict.flatten import FlatState
from asyncdcp.state_dict.matching import Match, match
from asyncdcp.state_dict.nodes import TreeNodes
from asyncdcp.state_dict.options import LoadOptions
from asyncdcp.state_dict.restoring import Restorer
from asyncdcp.state_dict.structure import DTYPE_NAMES
from asyncdcp.state_dict.targets import TensorTarget, new_tensors, targets_of
from asyncdcp.state_dict.unflatten import unflatten
from asyncdcp.transport.offered import Offered
from asyncdcp.transport.wire import StreamPlan


class Anew:
    """A new state of CPU tensors."""

    def __init__(self) -> None:
        self._state: Any = None

    def bind(self, offered: Offered) -> tuple[list[Want], list[TensorTarget]]:
        """Makes the state, its tensors still without content."""
        metadata = offered.metadata
        tree, values = decoded(offered)
        entries = metadata.state_dict_metadata.items()
        tensors = new_tensors(
            metadata, {name: torch.device("cpu") for name, entry in entries if isinstance(entry, TensorStorageMetadata)}
        )
        ties = {alias: tensors[name] for alias, name in metadata.aliases.items()}
        self._state = unflatten(tree, {**tensors, **ties}, values)
        return targets_of(metadata, tensors.items())

    def finish(self) -> Any:
        """The state."""
        return self._state


class InPlace:
    """A state that is there, flattened as ``flat``."""

    def __init__(self, state: Any, flat: FlatState) -> None:
        self._state = state
        self._flat = flat
        self._restorer: Restorer | None = None

    def bind(self, offered: Offered) -> tuple[list[Want], list[TensorTarget]]:
        """Matches the state with what is offered; ``StateMismatch`` otherwise."""
        options = LoadOptions()
        tree, values = decoded(offered)
        nodes = TreeNodes(tree, options.renamed)
        if is_alike(self._flat, offered.plan, tree, values):
            self._restorer = Restorer(self._flat, identity(self._flat), nodes, values, options)
            return own_targets(self._flat)
        found = match(self._flat, offered.metadata, nodes, options)
        made = new_tensors(offered.metadata, found.fresh, found.alike)
        found.add_fresh(made)
        self._restorer = Restorer(self._flat, found, nodes, values, options)
        return targets_of(offered.metadata, [*found.fill, *made.items()])

    def finish(self) -> Any:
        """Plain values, and every Stateful's ``load_state_dict``, in the state's order."""
        assert self._restorer is not None
        return self._restorer.restore(self._state)


# ── a state just as the sender's, as replicas have it: nothing is to be matched ─────────────────────────────────────


def is_alike(flat: FlatState, plan: StreamPlan, tree: Any, values: dict[str, Any]) -> bool:
    """Whether names, dtypes, shapes, ties and containers are all the same, and every tensor can be filled."""
    tensors = flat.tensors.values()
    return (
        not flat.subclasses
        and list(flat.tensors) == plan.names
        and [DTYPE_NAMES.get(tensor.dtype) for tensor in tensors] == plan.dtypes
        and [tuple(tensor.shape) for tensor in tensors] == plan.shapes
        and flat.aliases == plan.aliases
        and flat.values.keys() == values.keys()
        and bool(flat.tree == tree)
        and not any(tensor.is_meta or 0 in tensor.stride() for tensor in tensors)
    )


def identity(flat: FlatState) -> Match:
    """What matching would find."""
    tensors = {**flat.tensors, **{alias: flat.tensors[name] for alias, name in flat.aliases.items()}}
    others = (fqn for fqn, taken in flat.statefuls.items() if not isinstance(taken.stateful, torch.nn.Module))
    return Match({name: name for name in (*tensors, *flat.values)}, tensors=tensors, deciding=frozenset(others))


def own_targets(flat: FlatState) -> tuple[list[Want], list[TensorTarget]]:
    """Every tensor's, as ``targets_of``."""
    wants, targets = [], []
    for device in {tensor.device for tensor in flat.tensors.values() if not tensor.is_cpu}:
        torch.accelerator.synchronize(device)
    for name, tensor in flat.tensors.items():
        if type(tensor) is Tensor and tensor.numel():
            box = whole(tensor.shape)
            wants.append(Want(name, box))
            targets.append(TensorTarget(tensor, box, tensor.dtype))
            continue
        for box, local in local_chunks(tensor):
            if box.volume:
                wants.append(Want(name, box))
                targets.append(TensorTarget(local, box, tensor.dtype))
    return wants, targets


def decoded(offered: Offered) -> tuple[Any, dict[str, Any]]:
    """Tree and values, as JSON says them; not trusted yet."""
    try:
        tree = msgspec.json.decode(offered.plan.tree)
        values = {name: msgspec.json.decode(value) for name, value in offered.values.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"the offer of rank {offered.rank} is malformed: {error!s:.200}") from error
    return tree, values
