"""What a state knows of its parameters: whose optimizer's state is whose, which of a module's names are one, and which
are replicas that any of their ranks may write; and what the ranks compare of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
import xxhash
from torch import Tensor

from asyncdcp.planning import Structure
from asyncdcp.planning.held_chunks import Holdings, holdings_of
from asyncdcp.state_dict.chunks import is_dtensor
from asyncdcp.state_dict.flatten import FlatState
from asyncdcp.train_state import TrainState

_SAMPLES = 64


def optimizer_parameters(flat: FlatState) -> dict[str, Tensor]:
    """The parameters of the state's optimizers, by the FQN under which ``Optimizer.state_dict()`` has their states."""
    found: dict[str, Tensor] = {}
    for fqn, taken in flat.statefuls.items():
        if isinstance(taken.stateful, torch.optim.Optimizer):
            parameters = [parameter for group in taken.stateful.param_groups for parameter in group["params"]]
            prefix = _prefix(fqn) + "state."
            found.update({f"{prefix}{number}": parameter for number, parameter in enumerate(parameters)})
        elif isinstance(taken.stateful, TrainState):
            found.update({_prefix(fqn) + path: parameter for path, parameter in taken.stateful.parameters().items()})
    return found


def tied_parameters(flat: FlatState) -> dict[str, str]:
    """The first name of each parameter that stands in several places of one module, by all of its names."""
    names: dict[tuple[str, int], list[str]] = {}
    for fqn, taken in flat.statefuls.items():
        if isinstance(taken.stateful, torch.nn.Module):
            for name, parameter in taken.stateful.named_parameters(remove_duplicate=False):
                names.setdefault((fqn, id(parameter)), []).append(_prefix(fqn) + name)
    return {name: several[0] for several in names.values() if len(several) > 1 for name in several}


def _prefix(fqn: str) -> str:
    return f"{fqn}." if fqn else ""


def holdings(flat: FlatState, structure: Structure, sources: Sequence[Tensor], *, marked: bool) -> Holdings:
    """What this rank holds; with ``marked`` its replicas' fingerprints and digests of its values, for comparing.

    Sharded tensors, parameters of modules and the states of optimizers may be spread over their holders. Buffers of
    modules may differ between ranks, and are not compared.
    """
    parameters, buffers = _of_statefuls(flat)
    spread = {name for name, tensor in flat.tensors.items() if is_dtensor(tensor) or name in parameters}
    marks = [b""] * len(structure.chunks)
    if marked:
        names = [structure.tensors[chunk.tensor].name for chunk in structure.chunks]
        marks = [b"" if name in buffers else _fingerprint(tensor) for name, tensor in zip(names, sources, strict=True)]
    values = _digests(flat.values) if marked else {}
    return holdings_of(structure, spread.__contains__, marks, values)


def _of_statefuls(flat: FlatState) -> tuple[set[str], set[str]]:
    """The names of what is alike on all ranks that hold it, parameters and optimizer states; and of buffers."""
    parameters: set[str] = set()
    buffers: set[str] = set()
    for fqn, taken in flat.statefuls.items():
        if isinstance(taken.stateful, torch.optim.Optimizer):
            parameters |= taken.names
        elif isinstance(taken.stateful, torch.nn.Module | TrainState):
            whole = isinstance(taken.stateful, TrainState)
            modules = taken.stateful.models if isinstance(taken.stateful, TrainState) else (taken.stateful,)
            memory = {tensor.data_ptr() for module in modules for tensor in module.parameters()}
            states = {
                name for name in taken.names if whole and name.startswith(f"{fqn}.optimizer." if fqn else "optimizer.")
            }
            parameters |= states
            tensors = (taken.names & flat.tensors.keys()) - states
            same = {name for name in tensors if flat.tensors[name].data_ptr() in memory}
            parameters |= same
            buffers |= tensors - same
    return parameters, buffers


def _fingerprint(tensor: Tensor) -> bytes:
    """A digest of some elements, spread evenly: cheap, and different where the content is another's."""
    count = tensor.numel()
    if not count or tensor.dtype.itemsize == 0:
        return b""
    with torch.no_grad():
        flat = tensor.detach().resolve_conj().resolve_neg()
        flat = flat.view(-1) if flat.is_contiguous() else flat.reshape(-1)
        places = torch.linspace(0, count - 1, min(count, _SAMPLES), dtype=torch.float64).long()
        raw = flat.view(torch.uint8).view(count, -1) if flat.dtype.itemsize > 1 else flat.view(torch.uint8)
        taken = raw[places.to(raw.device)].cpu().contiguous()
    return xxhash.xxh3_64_digest(bytes(taken.flatten().tolist()))


def _digests(values: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: xxhash.xxh3_64_digest(msgspec.json.encode(value)) for name, value in values.items()}
