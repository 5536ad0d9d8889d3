"""One load: the plan's items become ranges with buffers, and the reader fills them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import msgspec
from anyio import to_thread

from asyncdcp.boxes import Box
from asyncdcp.metadata import DTYPE_SIZES, TensorStorageMetadata
from asyncdcp.pipeline.formats import ReadableCheckpoint
from asyncdcp.pipeline.windows import STRAIGHT_BYTES, ReadRange, copy_bytes
from asyncdcp.planning.load_plan import LoadPlan, ReadItem, in_batches
from asyncdcp.trace import Trace


class Target(Protocol):
    """Where the bytes of one ``Want`` go. ``deliver`` is called on worker threads, several at once for disjoint
    elements.
    """

    @property
    def buffer(self) -> memoryview | None:
        """The want's whole box as packed row-major bytes, if its memory can be written to directly."""
        ...

    def deliver(self, chunk: Box, start: int, data: memoryview) -> None:
        """Takes bytes of the stored ``chunk``, whole elements from its byte ``start`` on; what lies outside the want is
        ignored.
        """
        ...


_MOST_ALIGNED: Final = max(DTYPE_SIZES.values())
"""What begins at a multiple of it has whole elements, of whatever type."""
UNALIGNED_BYTES = 64 << 20
"""So much is held in memory at once of what has to be read as a whole before it can be delivered, or one item."""


async def load(reader: ReadableCheckpoint, plan: LoadPlan, targets: Sequence[Target], trace: Trace) -> None:
    """Fills ``targets`` (one for each of the plan's wants). Errors and guarantees are those of
    ``ReadableCheckpoint.read``.
    """
    ranges: list[ReadRange] = []
    unaligned: list[ReadItem] = []
    for item in plan.items:
        target = targets[item.want]
        length = item.end - item.begin
        copied = length < STRAIGHT_BYTES and item.begin % _MOST_ALIGNED == 0
        buffer = None if copied or item.target < 0 else target.buffer
        if buffer is not None:
            into = buffer[item.target : item.target + length]
            ranges.append(ReadRange(item.file, item.begin, item.end, into, None))
        elif not copied and item.begin % _itemsize(reader, plan, item):  # other formats place tensors anywhere
            unaligned.append(item)
        else:
            ranges.append(ReadRange(item.file, item.begin, item.end, None, _Placing(item, target)))
    await reader.read(ranges, trace)
    for batch in in_batches(unaligned, lambda item: item.end - item.begin, UNALIGNED_BYTES):
        await _load_whole(reader, batch, targets, trace)


def place(item: ReadItem, target: Target, offset: int, data: memoryview) -> None:
    """Puts verified bytes of an item, whole elements from its byte ``offset`` on, where its target wants them."""
    buffer = target.buffer if item.target >= 0 else None
    if buffer is None:
        target.deliver(item.chunk, item.start + offset, data)
    else:
        copy_bytes(buffer[item.target + offset : item.target + offset + len(data)], data)


async def _load_whole(
    reader: ReadableCheckpoint, items: Sequence[ReadItem], targets: Sequence[Target], trace: Trace
) -> None:
    """Delivers items each in one piece: read in several, their elements would be cut."""
    buffers = [bytearray(item.end - item.begin) for item in items]
    ranges = [
        ReadRange(item.file, item.begin, item.end, memoryview(buffer), None)
        for item, buffer in zip(items, buffers, strict=True)
    ]
    await reader.read(ranges, trace)
    for item, buffer in zip(items, buffers, strict=True):
        await to_thread.run_sync(targets[item.want].deliver, item.chunk, item.start, memoryview(buffer))


def _itemsize(reader: ReadableCheckpoint, plan: LoadPlan, item: ReadItem) -> int:
    tensor = reader.metadata.state_dict_metadata[plan.wants[item.want].name]
    assert isinstance(tensor, TensorStorageMetadata)
    return DTYPE_SIZES[tensor.properties.dtype]


class _Placing(msgspec.Struct, frozen=True, gc=False):
    """``place`` for an item, one of perhaps a hundred thousand: see ``ReadItem``."""

    item: ReadItem
    target: Target

    def __call__(self, offset: int, data: memoryview) -> None:
        place(self.item, self.target, offset, data)
