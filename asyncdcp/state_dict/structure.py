"""From tensors to what the plan knows of them: names, dtypes, shapes and chunks, without memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from asyncdcp.boxes import whole
from asyncdcp.metadata import DTYPE_SIZES
from asyncdcp.planning import ChunkSpec, Structure, TensorSpec
from asyncdcp.state_dict.flatten import FlatState

DTYPE_NAMES: dict[torch.dtype, str] = {
    getattr(torch, name): name for name in DTYPE_SIZES if isinstance(getattr(torch, name, None), torch.dtype)
}
"""torch's dtypes, as far as this torch has them, by the names that are stored."""

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Described(NamedTuple):
    """A state's structure, and for each of the structure's chunks the tensor that holds exactly its elements."""

    structure: Structure
    sources: list[Tensor]


def describe(flat: FlatState) -> Described:
    """The structure of a flattened state. Each plain tensor is one chunk, in the order of the state."""
    sources = list(flat.tensors.values())
    specs = tuple(
        TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in flat.tensors.items()
    )
    chunks = tuple(ChunkSpec(number, whole(spec.shape)) for number, spec in enumerate(specs))
    return Described(Structure(specs, chunks, flat.aliases, flat.tree), sources)
