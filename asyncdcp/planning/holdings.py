"""Holdings: what one rank holds of a state, as it tells the rank that divides it: columns, for chunks may be many."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import msgspec

from asyncdcp.boxes import Box
from asyncdcp.planning.save_plan import ChunkSpec, Structure, TensorSpec


class Holdings(msgspec.Struct):
    """What one rank holds of a state, without what is its own. Made by ``of``.

    ``spread`` says of each chunk whether any holder may write it. Replicas must have the same ``fingerprints``; an
    empty one is not compared. ``values`` are digests of plain values. ``save`` is the number of the next save that the
    rank plans.
    """

    packed: bytes
    """The tensors, encoded: most ranks have the same, so that they are decoded once."""
    tensor: bytes
    """Of each chunk the number of its tensor, as a signed integer of 8 bytes."""
    boxes: bytes
    """Of each chunk its offsets and then its sizes, as such integers."""
    spread: bytes
    fingerprints: list[bytes]
    values: dict[str, bytes]
    save: int = 0

    @classmethod
    def of(
        cls,
        tensors: Sequence[TensorSpec],
        chunks: Sequence[ChunkSpec],
        spread: Sequence[bool],
        fingerprints: Sequence[bytes],
        values: dict[str, bytes],
    ) -> Holdings:
        """A rank's, of ``tensors`` by number."""
        return cls(
            msgspec.msgpack.encode(tensors),
            array("q", [chunk.tensor for chunk in chunks]).tobytes(),
            array("q", chain.from_iterable((*box.offsets, *box.sizes) for _, box in chunks)).tobytes(),
            bytes(spread),
            list(fingerprints),
            values,
        )

    def tensors(self) -> list[TensorSpec]:
        """By number."""
        return msgspec.msgpack.decode(self.packed, type=list[TensorSpec])

    def chunks(self) -> Iterator[tuple[TensorSpec, Box]]:
        """In order of their numbers."""
        tensors, numbers = self.tensors(), iter(array("q", self.boxes))
        for tensor in array("q", self.tensor):
            spec = tensors[tensor]
            offsets = tuple(next(numbers) for _ in spec.shape)
            yield spec, Box(offsets, tuple(next(numbers) for _ in spec.shape))

    def unmarked(self) -> Holdings:
        """Without fingerprints and digests, which are of one moment."""
        return msgspec.structs.replace(self, fingerprints=[b""] * len(self.spread), values={})


def holdings_of(
    structure: Structure, spread: Callable[[str], bool], fingerprints: Sequence[bytes], values: dict[str, bytes]
) -> Holdings:
    """What a structure's rank holds, without what is its own."""
    chunks = [
        (number, chunk)
        for number, chunk in enumerate(structure.chunks)
        if structure.tensors[chunk.tensor].name not in structure.own and chunk.box.volume
    ]
    shared = [number for number, spec in enumerate(structure.tensors) if spec.name not in structure.own]
    renumbered = {number: place for place, number in enumerate(shared)}
    return Holdings.of(
        [structure.tensors[number] for number in shared],
        [ChunkSpec(renumbered[chunk.tensor], chunk.box) for _, chunk in chunks],
        [spread(structure.tensors[chunk.tensor].name) for _, chunk in chunks],
        [fingerprints[number] for number, _ in chunks],
        {name: digest for name, digest in values.items() if name not in structure.own},
    )
