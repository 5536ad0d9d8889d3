"""What a sender offers, checked: nothing that another process says is taken on trust."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import NamedTuple, NoReturn

import msgspec

from asyncdcp.boxes import Box, contains, whole
from asyncdcp.errors import CorruptCheckpoint, UnsupportedFormat
from asyncdcp.metadata import (
    DTYPE_SIZES,
    BytesStorageMetadata,
    ChunkLocation,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from asyncdcp.transport import wire
from asyncdcp.transport.wire import Offer, StreamPlan

_LIMIT = 1 << 62
_MAX_DIMENSIONS = 64
STREAM = ""
"""The name of the stream where ``planning`` asks for that of a file."""


class Chunk(NamedTuple):
    """A box of a tensor, and its bytes in the stream."""

    name: str
    box: Box
    begin: int
    end: int


@dataclass(frozen=True)
class Offered:
    """``chunks`` are in the order of the stream, and ``of`` has their numbers by tensor. ``borders`` are where blocks
    begin, and at last where the stream ends.
    """

    rank: int
    checksums: bool
    plan: StreamPlan
    values: dict[str, msgspec.Raw]
    chunks: list[Chunk]
    of: dict[str, list[int]]
    borders: list[int]

    @cached_property
    def metadata(self) -> Metadata:
        """The offer as if it were a checkpoint of one file. Not needed where a state is just as the sender's."""
        return _metadata(self)

    def tensors_in(self, block: int) -> list[str]:
        """Which tensors have bytes in a block."""
        begin, end = self.borders[block : block + 2]
        first = bisect_right(self.chunks, begin, key=lambda chunk: chunk.begin) - 1
        names: dict[str, None] = {}
        for chunk in self.chunks[first:]:
            if chunk.begin >= end:
                break
            names[chunk.name] = None
        return list(names)


def read_offer(offer: Offer) -> Offered:
    """``CorruptCheckpoint`` or ``UnsupportedFormat`` for an offer whose numbers do not fit each other."""
    plan, rank = wire.decode_plan(offer), offer.rank
    _check_tensors(plan, rank)
    chunks = _chunks(plan, rank)
    borders = [0, *accumulate(plan.blocks)]
    _check_blocks(plan, chunks, borders, rank)
    of: dict[str, list[int]] = {name: [] for name in plan.names}
    for number, chunk in enumerate(chunks):
        of[chunk.name].append(number)
    values = wire.decode_values(offer)
    for name in values:
        if name in of or name in plan.aliases:
            _corrupt(rank, f"{name} is both a tensor and a value")
    return Offered(rank, offer.checksums, plan, values, chunks, of, borders)


def _check_tensors(plan: StreamPlan, rank: int) -> None:
    known = set(plan.names)
    if not len(known) == len(plan.names) == len(plan.dtypes) == len(plan.shapes):
        _corrupt(rank, "names, dtypes and shapes of the tensors differ in number, or a name comes twice")
    for name, dtype, shape in zip(plan.names, plan.dtypes, plan.shapes, strict=True):
        if dtype not in DTYPE_SIZES:
            raise UnsupportedFormat(f"rank {rank} offers {name} of the unknown dtype {dtype[:40]!r}", tensors=[name])
        extent = prod(max(size, 1) for size in shape[:_MAX_DIMENSIONS])
        if len(shape) > _MAX_DIMENSIONS or min(shape, default=0) < 0 or extent * DTYPE_SIZES[dtype] >= _LIMIT:
            _corrupt(rank, f"{name} has an impossible shape")
    for alias, target in plan.aliases.items():
        if target not in known or alias in known:
            _corrupt(rank, f"the alias {alias} of {target} is not one")


def _chunks(plan: StreamPlan, rank: int) -> list[Chunk]:
    columns, ndims = plan.chunks, [len(shape) for shape in plan.shapes]
    if any(not 0 <= tensor < len(ndims) for tensor in columns.tensor):
        _corrupt(rank, "a chunk is of a tensor that is not listed")
    if not len(columns.offsets) == len(columns.sizes) == sum(ndims[tensor] for tensor in columns.tensor):
        _corrupt(rank, "the chunks' offsets and sizes do not fit their tensors' dimensions")
    found, position, begin = [], 0, 0
    for tensor in columns.tensor:
        name, end = plan.names[tensor], position + ndims[tensor]
        box = Box(tuple(columns.offsets[position:end]), tuple(columns.sizes[position:end]))
        size = DTYPE_SIZES[plan.dtypes[tensor]]
        if min(box.sizes, default=1) < 1 or not contains(whole(plan.shapes[tensor]), box) or begin % size:
            _corrupt(rank, f"a chunk of {name} is empty, leaves its shape, or begins within an element")
        found.append(Chunk(name, box, begin, begin + box.volume * size))
        position, begin = end, found[-1].end
    return found


def _check_blocks(plan: StreamPlan, chunks: list[Chunk], borders: list[int], rank: int) -> None:
    """The blocks make the stream, and no border lies within an element."""
    total = chunks[-1].end if chunks else 0
    if borders[-1] != total or any(not 0 < size <= wire.BLOCK_LIMIT for size in plan.blocks):
        _corrupt(rank, f"blocks of {borders[-1]} bytes for a stream of {total}, or of a size out of range")
    sizes = dict(zip(plan.names, map(DTYPE_SIZES.__getitem__, plan.dtypes), strict=True))
    current = 0
    for border in borders[:-1]:
        while chunks[current].end <= border:
            current += 1
        chunk = chunks[current]
        if (border - chunk.begin) % sizes[chunk.name]:
            _corrupt(rank, f"a block begins within an element of {chunk.name}")


def _metadata(offered: Offered) -> Metadata:
    plan, chunks, of, values = offered.plan, offered.chunks, offered.of, offered.values
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, dtype, shape in zip(plan.names, plan.dtypes, plan.shapes, strict=True):
        held = tuple(ChunkStorageMetadata(*chunks[number].box) for number in of[name])
        entries[name] = TensorStorageMetadata(TensorProperties(dtype), shape, held)
    for name, value in values.items():
        entries[name] = BytesStorageMetadata(len(value))
    return Metadata(
        state_dict_metadata=entries,
        storage_data={
            MetadataIndex(chunk.name, chunk.box.offsets): ChunkLocation(STREAM, chunk.begin, chunk.end - chunk.begin)
            for chunk in chunks
        },
        storage_meta=StorageMeta(f"rank {offered.rank}", "", 1, 0.0, {}),
        aliases=plan.aliases,
        tree=msgspec.Raw(plan.tree),
        values={name: msgspec.Raw(value) for name, value in values.items()},
    )


def _corrupt(rank: int, what: str) -> NoReturn:
    raise CorruptCheckpoint(f"the offer of rank {rank} is malformed: {what}", rank=rank)
