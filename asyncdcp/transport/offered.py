"""What a sender offers, checked: nothing that another process says is taken on trust."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple, NoReturn

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
class Layout:
    """What a ``StreamPlan`` says, checked: where everything of a state lies in the stream.

    Columns, and no object for each chunk: it is kept between transfers, and objects by the thousand cost the garbage
    collector more than all the looking. ``begins`` are where the chunks begin, ``borders`` where blocks do; at the end
    of both is where the stream ends. ``sole`` are the tensors that are one chunk, by name, with its number.
    """

    encoded: bytes
    plan: StreamPlan
    begins: list[int]
    borders: list[int]
    sole: dict[str, int]

    @cached_property
    def tensors(self) -> frozenset[str]:
        return frozenset(self.plan.names)

    @property
    def total(self) -> int:
        """Bytes of the stream."""
        return self.borders[-1]

    @cached_property
    def tree(self) -> Any:
        """The containers, as JSON says them; not trusted yet, and not to be changed."""
        return msgspec.json.decode(self.plan.tree)

    @cached_property
    def chunks(self) -> list[Chunk]:
        """Not needed where every tensor is sent whole, to one that is alike."""
        plan, boxes = self.plan, _boxes(self.plan)
        ends = self.begins[1:]
        return [
            Chunk(plan.names[tensor], box, begin, end)
            for tensor, box, begin, end in zip(plan.chunks.tensor, boxes, self.begins[:-1], ends, strict=True)
        ]

    @cached_property
    def of(self) -> dict[str, list[int]]:
        """The numbers of the chunks by tensor."""
        found: dict[str, list[int]] = {name: [] for name in self.plan.names}
        for number, tensor in enumerate(self.plan.chunks.tensor):
            found[self.plan.names[tensor]].append(number)
        return found

    def chunks_in(self, block: int) -> range:
        """The numbers of the chunks that have bytes in a block."""
        begin, end = self.borders[block : block + 2]
        return range(bisect_right(self.begins, begin) - 1, bisect_left(self.begins, end))

    def tensors_in(self, block: int) -> list[str]:
        """The tensors that have bytes in a block."""
        names, tensors = self.plan.names, self.plan.chunks.tensor
        return list(dict.fromkeys(names[tensors[number]] for number in self.chunks_in(block)))


@dataclass(frozen=True)
class Offered:
    """One offer: a layout, and the plain values of this time."""

    rank: int
    checksums: bool
    layout: Layout
    values: dict[str, msgspec.Raw]

    @cached_property
    def metadata(self) -> Metadata:
        """The offer as if it were a checkpoint of one file. Not needed where a state is just as the sender's."""
        return _metadata(self)


class LayoutCache:
    """The last few layouts: a state that comes again is not checked and taken apart again. From any thread."""

    def __init__(self, limit: int = 4) -> None:
        self._limit = limit
        self._seen: tuple[Layout, ...] = ()

    def read(self, offer: Offer) -> Offered:
        """``CorruptCheckpoint`` or ``UnsupportedFormat`` for an offer whose numbers do not fit each other."""
        encoded = bytes(offer.plan)
        layout = next((seen for seen in self._seen if seen.encoded == encoded), None)
        if layout is None:
            layout = read_layout(encoded, offer)
        self._seen = (layout, *[seen for seen in self._seen if seen is not layout][: self._limit - 1])
        values = wire.decode_values(offer)
        for name in values:
            if name in layout.tensors or name in layout.plan.aliases:
                _corrupt(offer.rank, f"{name} is both a tensor and a value")
        return Offered(offer.rank, offer.checksums, layout, values)


def read_layout(encoded: bytes, offer: Offer) -> Layout:
    """As ``LayoutCache.read``."""
    plan, rank = wire.decode_plan(offer), offer.rank
    _check_tensors(plan, rank)
    begins, sole = _check_chunks(plan, rank)
    borders = [0, *accumulate(plan.blocks)]
    _check_blocks(plan, begins, borders, rank)
    return Layout(encoded, plan, begins, borders, sole)


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


def _check_chunks(plan: StreamPlan, rank: int) -> tuple[list[int], dict[str, int]]:
    """``begins`` and ``sole`` of the layout."""
    columns, ndims = plan.chunks, [len(shape) for shape in plan.shapes]
    if any(not 0 <= tensor < len(ndims) for tensor in columns.tensor):
        _corrupt(rank, "a chunk is of a tensor that is not listed")
    if not len(columns.offsets) == len(columns.sizes) == sum(ndims[tensor] for tensor in columns.tensor):
        _corrupt(rank, "the chunks' offsets and sizes do not fit their tensors' dimensions")
    sizes = [DTYPE_SIZES[dtype] for dtype in plan.dtypes]
    begins, sole = [0], {}
    for number, (tensor, box) in enumerate(zip(columns.tensor, _boxes(plan), strict=True)):
        name, size, begin, shape = plan.names[tensor], sizes[tensor], begins[-1], plan.shapes[tensor]
        if box.sizes == shape and not any(box.offsets):
            sole[name] = number
        elif not contains(whole(shape), box):
            _corrupt(rank, f"a chunk of {name} is empty, leaves its shape, or begins within an element")
        if min(box.sizes, default=1) < 1 or begin % size:
            _corrupt(rank, f"a chunk of {name} is empty, leaves its shape, or begins within an element")
        begins.append(begin + box.volume * size)
    if len(sole) < len(columns.tensor):  # some come twice
        counts = Counter(columns.tensor)
        sole = {name: number for name, number in sole.items() if counts[columns.tensor[number]] == 1}
    return begins, sole


def _boxes(plan: StreamPlan) -> Iterator[Box]:
    """The chunks' boxes, in order."""
    columns, position = plan.chunks, 0
    for tensor in columns.tensor:
        end = position + len(plan.shapes[tensor])
        yield Box(tuple(columns.offsets[position:end]), tuple(columns.sizes[position:end]))
        position = end


def _check_blocks(plan: StreamPlan, begins: list[int], borders: list[int], rank: int) -> None:
    """The blocks make the stream, and no border lies within an element."""
    if borders[-1] != begins[-1] or any(not 0 < size <= wire.BLOCK_LIMIT for size in plan.blocks):
        _corrupt(rank, f"blocks of {borders[-1]} bytes for a stream of {begins[-1]}, or of a size out of range")
    for border in borders[:-1]:
        number = bisect_right(begins, border) - 1
        tensor = plan.chunks.tensor[number]
        if (border - begins[number]) % DTYPE_SIZES[plan.dtypes[tensor]]:
            _corrupt(rank, f"a block begins within an element of {plan.names[tensor]}")


def _metadata(offered: Offered) -> Metadata:
    layout, values = offered.layout, offered.values
    plan, chunks, of = layout.plan, layout.chunks, layout.of
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
