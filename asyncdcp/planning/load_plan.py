"""LoadPlan: which ranges of which data files fill the boxes that a load wants.

Every stored chunk that meets a wanted box gives read items; how the chunk was sharded at save does not matter. An item
is *direct* where its bytes are consecutive in the chunk and in the wanted box, so that they can be read straight to
their place; else the bytes of the chunk around the overlap are read and the target picks what it needs.

There may be a hundred thousand of each: the garbage collector does not look at them (``gc=False``), for it would look
at everything else, again and again, as they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TypeVar

import msgspec

from asyncdcp.boxes import Box, intersect
from asyncdcp.format.blocks import BLOCK_BYTES
from asyncdcp.metadata import (
    DTYPE_SIZES,
    ChunkLocation,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from asyncdcp.stored_chunks import StoredChunks

T = TypeVar("T")


class Want(msgspec.Struct, frozen=True, gc=False):
    """A box of tensor ``name`` that the caller wants filled, in elements of the whole tensor."""

    name: str
    box: Box


class ReadItem(msgspec.Struct, frozen=True, gc=False):
    """Bytes ``begin <= i < end`` of decoded data file ``file``, for want number ``want``.

    They are bytes of the chunk at ``chunk``, from its byte ``start`` on. ``target`` is the byte of the want's own
    (packed, row-major) box where they go, or -1 where they are not consecutive there.
    """

    want: int
    file: str
    begin: int
    end: int
    chunk: Box
    start: int
    target: int


@dataclass(frozen=True)
class LoadPlan:
    """Items sorted by file and begin; ``read_bytes`` is their sum, before blocks are rounded up."""

    wants: tuple[Want, ...]
    items: tuple[ReadItem, ...]
    read_bytes: int


def plan_load(metadata: Metadata, wants: Sequence[Want]) -> LoadPlan:
    """Plans a load. Every want must name a stored tensor and lie within its shape; empty boxes read nothing."""
    items: list[ReadItem] = []
    for number, want in enumerate(wants):
        items += _items(metadata, number, want)
    items.sort(key=lambda item: (item.file, item.begin))
    return LoadPlan(tuple(wants), tuple(items), sum(item.end - item.begin for item in items))


def _items(metadata: Metadata, number: int, want: Want) -> Iterator[ReadItem]:
    tensor = metadata.state_dict_metadata[want.name]
    assert isinstance(tensor, TensorStorageMetadata), f"{want.name} is not a tensor"
    itemsize = DTYPE_SIZES[tensor.properties.dtype]
    for box, location in _meeting(metadata, want, tensor):
        if box == want.box:
            yield ReadItem(number, location.file, location.begin, location.begin + location.length, box, 0, 0)
            continue
        common = intersect(box, want.box)
        if common is not None:
            yield from _cut(number, want, (box, location), common, itemsize)


def in_batches(items: Iterable[T], nbytes: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """The items in their order, as many at once as have no more than ``limit`` bytes; a larger one is alone."""
    batch: list[T] = []
    held = 0
    for item in items:
        length = nbytes(item)
        if batch and held + length > limit:
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += length
    if batch:
        yield batch


def _meeting(metadata: Metadata, want: Want, tensor: TensorStorageMetadata) -> Iterator[tuple[Box, ChunkLocation]]:
    """The chunks that the wanted box may meet."""
    if isinstance(metadata.storage_data, StoredChunks):
        yield from metadata.storage_data.meeting(want.name, want.box)
        return
    for chunk in tensor.chunks:
        box = Box(chunk.offsets, chunk.sizes)
        if box.volume:
            yield box, metadata.storage_data[MetadataIndex(want.name, chunk.offsets)]


def _cut(number: int, want: Want, chunk: tuple[Box, ChunkLocation], common: Box, itemsize: int) -> Iterator[ReadItem]:
    """One item for each run of the overlap."""
    box, location = chunk
    for part in _runs(box, common, itemsize):
        first, last = _flat(box, part)
        target = -1
        if last - first == part.volume:
            target_first, target_last = _flat(want.box, part)
            if target_last - target_first == part.volume:
                target = target_first * itemsize
        begin = location.begin + first * itemsize
        yield ReadItem(number, location.file, begin, location.begin + last * itemsize, box, first * itemsize, target)


def _runs(chunk: Box, common: Box, itemsize: int) -> Iterator[Box]:
    """``common`` cut along its first dimensions into boxes of which each is read as a whole, gaps included.

    It is cut as deep as the boxes are a block or more long, or a block or more lies between them.
    """
    depth, run = 0, itemsize  # ``run`` is the bytes from first to last of a box of the dimensions seen so far
    for dim in reversed(range(len(common.sizes))):
        stride = prod(chunk.sizes[dim + 1 :]) * itemsize  # from one position in ``dim`` to the next
        apart = common.sizes[dim] > 1
        if apart and stride > run and (run >= BLOCK_BYTES or stride - run >= BLOCK_BYTES):
            depth = dim + 1
            break
        run += (common.sizes[dim] - 1) * stride
    steps = (
        range(start, start + size) for start, size in zip(common.offsets[:depth], common.sizes[:depth], strict=True)
    )
    for position in product(*steps):
        yield Box((*position, *common.offsets[depth:]), (*(1,) * depth, *common.sizes[depth:]))


def _flat(outer: Box, inner: Box) -> tuple[int, int]:
    """The first and one past the last element of ``inner`` in the row-major order of ``outer``."""
    first = last = 0
    for o_start, o_size, i_start, i_size in zip(outer.offsets, outer.sizes, inner.offsets, inner.sizes, strict=True):
        first = first * o_size + i_start - o_start
        last = last * o_size + i_start + i_size - 1 - o_start
    return first, last + 1
