"""The stream of a state: its chunks one after another, cut into blocks. Pure; follows from the structure alone.

Chunks are placed by descending element size, so that each begins at a multiple of its own, and of one element size the
small ones first. Small chunks are packed into blocks; a large one has blocks of its own, which can be sent from where
the tensor lies and received where it is to lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import msgspec

from asyncdcp.format.image import FileImage
from asyncdcp.metadata import DTYPE_SIZES, ChunkColumns
from asyncdcp.planning import Piece, SavePlan, Slab, Structure
from asyncdcp.planning.save_plan import chunk_length
from asyncdcp.transport import wire

LARGE_BYTES = 256 << 10
"""Chunks from this size on have blocks of their own."""


@dataclass(frozen=True)
class Stream:
    """``plan`` is for the copier: one image, without a header, whose slabs are the blocks; ``batches`` are their
    numbers, ``encoded`` is the ``wire.StreamPlan``.
    """

    plan: SavePlan
    batches: tuple[range, ...]
    encoded: bytes

    @property
    def blocks(self) -> Sequence[Slab]:
        return self.plan.slabs

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest block; 0 if there is none."""
        return max((block.length for block in self.blocks), default=0)

    def names(self, block: Slab) -> list[str]:
        """The tensors that have bytes in a block."""
        structure = self.plan.structure
        return list(dict.fromkeys(structure.tensors[structure.chunks[p.chunk].tensor].name for p in block.pieces))

    def names_in(self, batch: int) -> list[str]:
        """As ``names``, of a batch by its number."""
        found = (self.names(self.blocks[block]) for block in self.batches[batch - 1])
        return list(dict.fromkeys(chain.from_iterable(found)))


def plan_stream(structure: Structure, block_bytes: int) -> Stream:
    """Deterministic."""
    lengths = [chunk_length(structure, chunk) for chunk in structure.chunks]
    order = _order(structure, lengths)
    blocks = tuple(_cut(order, lengths, block_bytes))
    begins, end = [], 0
    for number in order:
        begins.append(end)
        end += lengths[number]
    image = FileImage(b"", tuple(order), tuple(begins), end)
    numbers = tuple(range(len(lengths)))
    plan = SavePlan(structure, structure.chunks, numbers, (image,), blocks, b"", end)
    return Stream(plan, tuple(wire.batches(blocks)), msgspec.json.encode(_described(structure, order, blocks)))


def _order(structure: Structure, lengths: Sequence[int]) -> list[int]:
    sizes = [DTYPE_SIZES[structure.tensors[chunk.tensor].dtype] for chunk in structure.chunks]
    found = [number for number, length in enumerate(lengths) if length]
    return sorted(found, key=lambda number: (-sizes[number], lengths[number] >= LARGE_BYTES))


def _cut(order: Sequence[int], lengths: Sequence[int], block_bytes: int) -> Iterator[Slab]:
    begin = filled = 0
    pieces: list[Piece] = []
    large = min(LARGE_BYTES, block_bytes)
    for number in order:
        length = lengths[number]
        if pieces and (length >= large or filled + length > block_bytes):
            yield Slab(0, begin, filled, tuple(pieces))
            begin, filled, pieces = begin + filled, 0, []
        if length < large:
            pieces.append(Piece(number, 0, filled, length))
            filled += length
            continue
        for start in range(0, length, block_bytes):
            part = min(block_bytes, length - start)
            yield Slab(0, begin, part, (Piece(number, start, 0, part),))
            begin += part
    if pieces:
        yield Slab(0, begin, filled, tuple(pieces))


def _described(structure: Structure, order: Sequence[int], blocks: Sequence[Slab]) -> wire.StreamPlan:
    chunks = [structure.chunks[number] for number in order]
    columns = ChunkColumns(
        tensor=[chunk.tensor for chunk in chunks],
        offsets=[offset for chunk in chunks for offset in chunk.box.offsets],
        sizes=[size for chunk in chunks for size in chunk.box.sizes],
    )
    return wire.StreamPlan(
        names=[tensor.name for tensor in structure.tensors],
        dtypes=[tensor.dtype for tensor in structure.tensors],
        shapes=[tensor.shape for tensor in structure.tensors],
        aliases=structure.aliases,
        chunks=columns,
        blocks=[block.length for block in blocks],
        tree=msgspec.Raw(msgspec.json.encode(structure.tree)),
    )


class StreamCache:
    """The last few streams, by structure. ``StructureCache`` gives the very same structure again."""

    def __init__(self, block_bytes: int, limit: int = 4) -> None:
        self._block_bytes = block_bytes
        self._limit = limit
        self._streams: tuple[Stream, ...] = ()

    def get(self, structure: Structure) -> Stream:
        """The stream of ``structure``, planned if it is new."""
        found = next((stream for stream in self._streams if stream.plan.structure is structure), None)
        if found is None:
            found = plan_stream(structure, self._block_bytes)
        self._streams = (found, *[stream for stream in self._streams if stream is not found][: self._limit - 1])
        return found
