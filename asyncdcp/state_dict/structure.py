"""From tensors to what the plan knows of them: names, dtypes, shapes and chunks, without memory."""

from __future__ import annotations

import operator
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
    specs = tuple(
        TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in flat.tensors.items()
    )
    chunks = tuple(ChunkSpec(number, whole(spec.shape)) for number, spec in enumerate(specs))
    return Described(Structure(specs, chunks, flat.aliases, flat.tree), list(flat.tensors.values()))


_dtype, _shape = operator.attrgetter("dtype"), operator.attrgetter("shape")


class _Seen(NamedTuple):
    """What a structure followed from, in torch's own terms, which are quick to compare."""

    names: list[str]
    dtypes: list[torch.dtype]
    shapes: list[torch.Size]
    structure: Structure

    def fits(self, flat: FlatState, tensors: list[Tensor]) -> bool:
        """Whether a state is of this structure. No objects are left over for the garbage collector to count."""
        return (
            list(flat.tensors) == self.names
            and all(map(operator.eq, map(_dtype, tensors), self.dtypes))
            and all(map(operator.eq, map(_shape, tensors), self.shapes))
            and flat.aliases == self.structure.aliases
            and bool(flat.tree == self.structure.tree)
        )


class StructureCache:
    """Describes states; one that is as one of the last few were gets the very same ``Structure``, which costs much less
    than to make an equal one: objects by the thousand set off the garbage collector. From any thread.
    """

    def __init__(self, limit: int = 4) -> None:
        self._limit = limit
        self._seen: tuple[_Seen, ...] = ()

    def describe(self, flat: FlatState) -> Described:
        """As the function ``describe``."""
        sources = list(flat.tensors.values())
        for seen in self._seen:
            if seen.fits(flat, sources):
                self._remember(seen)
                return Described(seen.structure, sources)
        made = describe(flat)
        names, dtypes = list(flat.tensors), [tensor.dtype for tensor in sources]
        self._remember(_Seen(names, dtypes, [tensor.shape for tensor in sources], made.structure))
        return made

    def _remember(self, latest: _Seen) -> None:
        self._seen = (latest, *[seen for seen in self._seen if seen is not latest][: self._limit - 1])
