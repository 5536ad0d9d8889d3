"""SavePlan: where every byte of a rank's state goes, planned once per structure and kept.

A plan follows from the ``Structure`` alone: names, shapes, dtypes, chunks, alias groups, containers. It holds the file
images, the slabs in which they are staged and written, and the encoded part of the Index that a repeated save writes
again unchanged. Tensors and plain values are not in it: they are bound anew at every save.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from asyncdcp.boxes import Box, row_major_boxes
from asyncdcp.format.blocks import SLAB_BYTES
from asyncdcp.format.image import FILE_LIMIT, FileImage, HeaderEntry, lay_out
from asyncdcp.metadata import DTYPE_SIZES, ImageShape, IndexPlan, WrittenColumns


class TensorSpec(NamedTuple):
    """A whole tensor as the plan sees it; ``dtype`` is a key of ``metadata.DTYPE_SIZES``."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class ChunkSpec(NamedTuple):
    """A box of tensor number ``tensor`` that this rank is to write."""

    tensor: int
    box: Box


@dataclass(frozen=True)
class Structure:
    """Everything a plan depends on; equal structures share a plan.

    ``tree`` is the JSON-able container structure. ``aliases`` map tied FQNs to the stored one, so untying weights makes
    a new plan. ``own`` are the names, values' too, that belong to this rank alone.
    """

    tensors: tuple[TensorSpec, ...]
    chunks: tuple[ChunkSpec, ...]
    aliases: dict[str, str]
    tree: Any
    rank: int = 0
    own: frozenset[str] = frozenset()


class Piece(NamedTuple):
    """``length`` bytes of chunk number ``chunk``, from byte ``start`` of the chunk, to byte ``offset`` of a slab."""

    chunk: int
    start: int
    offset: int
    length: int


class Slab(NamedTuple):
    """A run of ``length`` bytes of file ``file``, from byte ``begin`` on; ``pieces`` lie in it in order.

    The file's header bytes, where the slab reaches into them, come before all pieces.
    """

    file: int
    begin: int
    length: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class SavePlan:
    """A structure's images, cut into slabs, and its encoded Index part.

    ``chunks`` are the structure's, those larger than a file in parts; ``origins`` are the numbers of the structure's
    chunks that they come from.
    """

    structure: Structure
    chunks: tuple[ChunkSpec, ...]
    origins: tuple[int, ...]
    images: tuple[FileImage, ...]
    slabs: tuple[Slab, ...]
    index_plan: bytes
    tensor_bytes: int


class PlanCache:
    """The last few plans, by structure. Compared exactly, not hashed, which would cost more than it saves."""

    def __init__(self, limit: int = 4) -> None:
        self._limit = limit
        self._plans: list[SavePlan] = []

    def get(self, structure: Structure) -> SavePlan:
        """The plan for ``structure``, made if there is none; drops the least recently used beyond the limit."""
        for number, plan in enumerate(self._plans):
            if plan.structure == structure:
                self._plans.insert(0, self._plans.pop(number))
                return plan
        plan = plan_save(structure)
        self._plans = [plan, *self._plans[: self._limit - 1]]
        return plan


def plan_save(structure: Structure, *, slab_bytes: int = SLAB_BYTES, file_limit: int = FILE_LIMIT) -> SavePlan:
    """Plans one rank's save. Deterministic: the same structure gives the same bytes of header and index."""
    parts = [(n, part) for n, chunk in enumerate(structure.chunks) for part in _split(structure, chunk, file_limit)]
    origins, chunks = tuple(n for n, _ in parts), tuple(part for _, part in parts)
    entries = [HeaderEntry(*structure.tensors[chunk.tensor], chunk.box) for chunk in chunks]
    images = tuple(lay_out(entries, {"format": "pt"}, file_limit=file_limit))
    lengths = [chunk_length(structure, chunk) for chunk in chunks]
    slabs = tuple(slab for file, image in enumerate(images) for slab in _cut(file, image, lengths, slab_bytes))
    return SavePlan(structure, chunks, origins, images, slabs, _encode(structure, chunks, images), sum(lengths))


def chunk_length(structure: Structure, chunk: ChunkSpec) -> int:
    """The bytes of a chunk."""
    return chunk.box.volume * DTYPE_SIZES[structure.tensors[chunk.tensor].dtype]


def _split(structure: Structure, chunk: ChunkSpec, file_limit: int) -> Iterator[ChunkSpec]:
    """The chunk itself, or row-major parts of it that each fit into a file."""
    itemsize = DTYPE_SIZES[structure.tensors[chunk.tensor].dtype]
    limit = max(1, file_limit // itemsize)
    if chunk.box.volume <= limit:
        yield chunk
        return
    for begin in range(0, chunk.box.volume, limit):
        for _, box in row_major_boxes(chunk.box.sizes, begin, min(begin + limit, chunk.box.volume)):
            offsets = tuple(a + b for a, b in zip(chunk.box.offsets, box.offsets, strict=True))
            yield ChunkSpec(chunk.tensor, Box(offsets, box.sizes))


def _cut(file: int, image: FileImage, lengths: Sequence[int], slab_bytes: int) -> Iterator[Slab]:
    """The slabs of one image. Empty chunks are in none."""
    pieces: list[list[Piece]] = [[] for _ in range(0, image.size, slab_bytes)]
    for chunk, begin in zip(image.chunks, image.begins, strict=True):
        position, end = begin, begin + lengths[chunk]
        while position < end:
            number, offset = divmod(position, slab_bytes)
            length = min(end - position, slab_bytes - offset)
            pieces[number].append(Piece(chunk, position - begin, offset, length))
            position += length
    for number, inside in enumerate(pieces):
        begin = number * slab_bytes
        yield Slab(file, begin, min(slab_bytes, image.size - begin), tuple(inside))


def _encode(structure: Structure, chunks: Sequence[ChunkSpec], images: Sequence[FileImage]) -> bytes:
    rows = [
        (file, n, begin)
        for file, image in enumerate(images)
        for n, begin in zip(image.chunks, image.begins, strict=True)
    ]
    written = WrittenColumns(
        tensor=[chunks[n].tensor for _, n, _ in rows],
        offsets=[offset for _, n, _ in rows for offset in chunks[n].box.offsets],
        sizes=[size for _, n, _ in rows for size in chunks[n].box.sizes],
        file=[file for file, _, _ in rows],
        begin=[begin for _, _, begin in rows],
    )
    plan = IndexPlan(
        names=[tensor.name for tensor in structure.tensors],
        dtypes=[tensor.dtype for tensor in structure.tensors],
        shapes=[tensor.shape for tensor in structure.tensors],
        aliases=structure.aliases,
        written=written,
        images=[ImageShape(image.size, len(image.header)) for image in images],
        tree=msgspec.Raw(msgspec.json.encode(structure.tree)),
        own=sorted(structure.own),
    )
    return msgspec.json.encode(plan)
