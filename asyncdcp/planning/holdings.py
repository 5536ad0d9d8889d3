"""Holdings: what one rank holds of a state, as it tells the rank that divides it: columns, for chunks may be many."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import msgspec

from asyncdcp.boxes import Box
from asyncdcp.planning.save_plan import Structure, TensorSpec


class Holdings(msgspec.Struct):
    """What one rank holds of a state, without what is its own. Made by ``holdings_of``.

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
    boxes = (chunk.box for _, chunk in chunks)
    return Holdings(
        packed=msgspec.msgpack.encode([structure.tensors[number] for number in shared]),
        tensor=array("q", [renumbered[chunk.tensor] for _, chunk in chunks]).tobytes(),
        boxes=array("q", chain.from_iterable((*box.offsets, *box.sizes) for box in boxes)).tobytes(),
        spread=bytes(spread(structure.tensors[chunk.tensor].name) for _, chunk in chunks),
        fingerprints=[fingerprints[number] for number, _ in chunks],
        values={name: digest for name, digest in values.items() if name not in structure.own},
    )
