"""From tensors to what the plan knows of them: names, dtypes, shapes and chunks, without memory."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asyncdcp.metadata import DTYPE_SIZES
from asyncdcp.planning import ChunkSpec, Structure, TensorSpec
from asyncdcp.state_dict.chunks import LocalChunk, layout, local_chunks
from asyncdcp.state_dict.flatten import FlatState
from asyncdcp.state_dict.leaves import Refusal
from asyncdcp.state_dict.pruning import own_leaves
from asyncdcp.state_dict.values import unsupported

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
    """The structure of what this process holds of a flattened state, in the order of the state: each plain tensor is
    one chunk, a sharded one as many as lie here. ``UnsupportedValue`` where the chunks of one cannot be told.
    """
    specs = tuple(
        TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in flat.tensors.items()
    )
    held = [(number, chunk) for number, item in enumerate(flat.tensors.items()) for chunk in _chunks(*item)]
    chunks = tuple(ChunkSpec(number, chunk.box) for number, chunk in held)
    own = own_leaves(flat.tree)
    own |= {alias for alias, name in flat.aliases.items() if name in own}
    structure = Structure(specs, chunks, flat.aliases, flat.tree, own=frozenset(own))
    return Described(structure, [chunk.tensor for _, chunk in held])


def _chunks(name: str, tensor: Tensor) -> list[LocalChunk]:
    try:
        return local_chunks(tensor)
    except Refusal as refusal:
        raise unsupported(name, tensor, str(refusal)) from None


_dtype, _shape = operator.attrgetter("dtype"), operator.attrgetter("shape")
PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer})


def _layouts(tensors: list[Tensor]) -> dict[int, Any]:
    """What the chunks of the sharded ones depend on, by number; most states have none."""
    if PLAIN.issuperset(map(type, tensors)):
        return {}
    return {
        number: found
        for number, tensor in enumerate(tensors)
        if type(tensor) not in PLAIN and (found := layout(tensor)) is not None
    }


class _Seen(NamedTuple):
    """What a structure followed from, in torch's own terms, which are quick to compare."""

    names: list[str]
    dtypes: list[torch.dtype]
    shapes: list[torch.Size]
    layouts: dict[int, Any]
    structure: Structure

    def fits(self, flat: FlatState, tensors: list[Tensor], layouts: dict[int, Any]) -> bool:
        """Whether a state is of this structure. No objects are left over for the garbage collector to count."""
        return (
            list(flat.tensors) == self.names
            and all(map(operator.eq, map(_dtype, tensors), self.dtypes))
            and all(map(operator.eq, map(_shape, tensors), self.shapes))
            and layouts == self.layouts
            and flat.aliases == self.structure.aliases
            and bool(flat.tree == self.structure.tree)
        )

    def sources(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors of the structure's chunks in a state that it fits."""
        if not self.layouts:
            return tensors
        names = self.names
        return [
            source
            for number, tensor in enumerate(tensors)
            for source in (
                [chunk.tensor for chunk in _chunks(names[number], tensor)] if number in self.layouts else [tensor]
            )
        ]


class StructureCache:
    """Describes states; one that is as one of the last few were gets the very same ``Structure``, which costs much less
    than to make an equal one: objects by the thousand set off the garbage collector. From any thread.
    """

    def __init__(self, limit: int = 4) -> None:
        self._limit = limit
        self._seen: tuple[_Seen, ...] = ()

    def describe(self, flat: FlatState) -> Described:
        """As the function ``describe``."""
        tensors = list(flat.tensors.values())
        layouts = _layouts(tensors)
        for seen in self._seen:
            if seen.fits(flat, tensors, layouts):
                self._remember(seen)
                return Described(seen.structure, seen.sources(tensors))
        made = describe(flat)
        names, dtypes = list(flat.tensors), [tensor.dtype for tensor in tensors]
        self._remember(_Seen(names, dtypes, [tensor.shape for tensor in tensors], layouts, made.structure))
        return made

    def _remember(self, latest: _Seen) -> None:
        self._seen = (latest, *[seen for seen in self._seen if seen is not latest][: self._limit - 1])
