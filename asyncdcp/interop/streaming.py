"""Tensors from one checkpoint to another, a window at a time, so that no more than a few are in memory.

    reader ─▶ window of whole tensors ─▶ slab of the new file's image ─▶ its sink

A window is as many tensors as fit into ``WINDOW_BYTES``, in the order of the images to be written; a tensor larger than
that passes alone. The next window is read while the one before is written.
"""

from __future__ import annotations

import ctypes
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Protocol

import anyio
import torch
import xxhash
from anyio import to_thread
from torch import Tensor

from asyncdcp.boxes import Box, whole
from asyncdcp.errors import UnsupportedFormat
from asyncdcp.interop.selection import Chosen
from asyncdcp.pipeline.formats import ReadableCheckpoint
from asyncdcp.pipeline.load import load
from asyncdcp.planning import SavePlan, Slab, Want, plan_load
from asyncdcp.state_dict.structure import DTYPES
from asyncdcp.state_dict.targets import TensorTarget
from asyncdcp.state_dict.tensors import memory
from asyncdcp.trace import Trace
from asyncdcp.unwinding import ungrouped

WINDOW_BYTES = 64 << 20

Fill = Callable[[memoryview], None]


class Wanted(tuple[Chosen, Box]):
    """A box of a tensor, to be read as a tensor of its own."""

    __slots__ = ()

    @property
    def nbytes(self) -> int:
        """Its bytes as they are written."""
        chosen, box = self
        return box.volume * DTYPES[chosen.dtype].itemsize


class SlabSink(Protocol):
    """Where the slabs of a plan go, in order. ``put`` returns when the sink has taken the slab; it calls ``fill`` with
    a buffer of the slab's length once, before it returns.
    """

    async def put(self, slab: Slab, fill: Fill) -> None: ...


async def read_tensors(reader: ReadableCheckpoint, wanted: Sequence[Wanted], trace: Trace) -> list[Tensor]:
    """Those boxes as CPU tensors of the dtype that they are to have, contiguous."""
    stored = [torch.empty(box.sizes, dtype=known_dtype(chosen.stored, chosen.source)) for chosen, box in wanted]
    wants, targets = [], []
    for (chosen, box), tensor in zip(wanted, stored, strict=True):
        if tensor.numel():
            wants.append(Want(chosen.source, box))
            targets.append(TensorTarget(tensor, box, tensor.dtype))
    await load(reader, await to_thread.run_sync(plan_load, reader.metadata, wants), targets, trace)
    dtypes = [known_dtype(chosen.dtype, chosen.name) for chosen, _ in wanted]
    return await to_thread.run_sync(lambda: [tensor.to(dtype) for tensor, dtype in zip(stored, dtypes, strict=True)])


def known_dtype(name: str, tensor: str) -> torch.dtype:
    """torch's dtype; ``UnsupportedFormat`` if this torch does not have it."""
    if name not in DTYPES:
        raise UnsupportedFormat(f"{tensor} has dtype {name}, which this torch does not have", tensors=[tensor])
    return DTYPES[name]


def windows(wanted: Sequence[Wanted], limit: int = WINDOW_BYTES) -> Iterator[list[int]]:
    """Runs of numbers into ``wanted`` of at most ``limit`` bytes each, or of one that is larger."""
    window: list[int] = []
    filled = 0
    for number, item in enumerate(wanted):
        if window and filled + item.nbytes > limit:
            yield window
            window, filled = [], 0
        window.append(number)
        filled += item.nbytes
    if window:
        yield window


@asynccontextmanager
async def read_ahead(
    reader: ReadableCheckpoint, wanted: Sequence[Wanted], trace: Trace
) -> AsyncIterator[AsyncIterator[dict[int, Tensor]]]:
    """Window by window, by numbers into ``wanted``; one window is read ahead."""
    send, receive = anyio.create_memory_object_stream[dict[int, Tensor]](0)

    async def work() -> None:
        for window in windows(wanted):
            tensors = await read_tensors(reader, [wanted[number] for number in window], trace)
            await send.send(dict(zip(window, tensors, strict=True)))
        send.close()  # not on an error: that ends whoever waits for the next window, and is what they hear

    with ungrouped():
        async with send, receive, anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            yield receive
            tasks.cancel_scope.cancel()


class Digests:
    """XXH3-128 of tensors' bytes by number, so that what was written can be held against what was read."""

    def __init__(self) -> None:
        self.found: dict[int, bytes] = {}

    def add(self, tensors: Mapping[int, Tensor]) -> None:
        """A thread's work."""
        for number, tensor in tensors.items():
            self.found[number] = xxhash.xxh3_128_digest(memory(tensor))


async def write_plan(reader: ReadableCheckpoint, plan: SavePlan, chosen: Sequence[Chosen], sink: SlabSink) -> Digests:
    """Every slab of ``plan`` to ``sink``; ``chosen`` are the plan's tensors. Digests are by chunk of the plan."""
    order = [number for image in plan.images for number in image.chunks]
    wanted = [Wanted((chosen[plan.chunks[n].tensor], plan.chunks[n].box)) for n in order]
    digests = Digests()
    held: dict[int, Tensor] = {}
    async with read_ahead(reader, wanted, Trace()) as ahead:
        for slab in plan.slabs:
            for piece in slab.pieces:
                while piece.chunk not in held:
                    window = await anext(aiter(ahead))
                    named = {order[number]: tensor for number, tensor in window.items()}
                    await to_thread.run_sync(digests.add, named)
                    held |= named
            await sink.put(slab, partial(_fill, plan, slab, held))
            for piece in slab.pieces:
                if piece.start + piece.length == held[piece.chunk].nbytes:
                    del held[piece.chunk]
    for number in order:
        digests.found.setdefault(number, xxhash.xxh3_128_digest(b""))  # of empty chunks, which are in no slab
    return digests


def _fill(plan: SavePlan, slab: Slab, held: Mapping[int, Tensor], into: memoryview) -> None:
    header = plan.images[slab.file].header[slab.begin : slab.begin + slab.length]
    into[: len(header)] = header
    address = ctypes.addressof(ctypes.c_char.from_buffer(into))
    for piece in slab.pieces:
        ctypes.memmove(address + piece.offset, held[piece.chunk].data_ptr() + piece.start, piece.length)


def whole_tensor(chosen: Chosen) -> Wanted:
    """All of a tensor."""
    return Wanted((chosen, whole(chosen.shape)))
