"""Copies tensors into slabs: long contiguous runs by memmove, many small ones by one kernel call, strided ones box by
box.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import groupby
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from asyncdcp.boxes import Box, row_major_boxes
from asyncdcp.planning import Piece, SavePlan, Slab
from asyncdcp.staging.accelerator import DeviceCopies, DeviceFence, Marks, wait_on_host

SMALL_BYTES = 64 << 10
"""Whole chunks shorter than this are gathered by ``torch.cat``: one release of the GIL for many, where a busy trainer
could take a switch interval to hand it back after each."""

GATHERED = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
)
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Source(NamedTuple):
    """A chunk's elements; ``address`` is that of its packed bytes, 0 where they are not packed in host memory."""

    tensor: Tensor
    address: int


class SlabCopier:
    """Fills slabs for one save. ``sources[n]`` holds the elements of the plan's structure's chunk ``n``; they are kept
    alive until ``drop``. ``copy`` may run on several threads for different slabs.

    Nothing is made ahead, and no object per small chunk: objects by the thousand set off the garbage collector.
    """

    def __init__(self, plan: SavePlan, sources: Sequence[Tensor], fence: DeviceFence) -> None:
        self._plan = plan
        self._fence = fence
        self._copies = DeviceCopies(fence)
        self._sources = list(sources)

    def copy(self, slab: Slab, into: Tensor) -> Callable[[], None] | None:
        """Copies the header's part and all pieces of ``slab`` to ``into``, a contiguous uint8 tensor of at least the
        slab's length.

        What comes from accelerators may still be on its way: the result, if there is one, waits for it on the host.
        Where this raises, nothing is on its way.
        """
        header = self._plan.images[slab.file].header[slab.begin : slab.begin + slab.length]
        if header:
            ctypes.memmove(into.data_ptr(), header, len(header))
        asynchronous = False
        try:
            with torch.no_grad():
                for (device, dtype), pieces in groupby(slab.pieces, self._kind):
                    with self._copies.on(device) as on_its_way:
                        asynchronous = asynchronous or on_its_way
                        self._copy_group(list(pieces), dtype, into, on_its_way=on_its_way)
        except BaseException:
            self.finish()
            raise
        return partial(wait_on_host, self._copies.marks()) if asynchronous else None

    def on(self, device: torch.device) -> AbstractContextManager[bool]:
        """The stream of the copies from ``device`` is current in the block: for memory there to copy to."""
        return self._copies.on(device)

    def marks(self) -> Marks:
        """Where, in the work of the devices, all that was copied so far has been read."""
        return self._copies.marks()

    def finish(self) -> None:
        """Waits on the host until nothing is on its way."""
        self._copies.finish()

    def drop(self) -> None:
        """Lets go of the tensors: nothing is copied any more."""
        self._sources.clear()

    def from_device(self, slab: Slab) -> bool:
        """Whether something in ``slab`` comes from an accelerator."""
        on = self._fence.devices
        return bool(on) and any(self._sources[self._plan.origins[piece.chunk]].device in on for piece in slab.pieces)

    def _kind(self, piece: Piece) -> tuple[torch.device, torch.dtype | None]:
        """A piece's device, and the dtype to gather it by, None if it is copied alone."""
        tensor = self._sources[self._plan.origins[piece.chunk]]
        small = piece.length < SMALL_BYTES and piece.length == tensor.nbytes and tensor.dtype in GATHERED
        return tensor.device, tensor.dtype if small else None

    def _copy_group(self, pieces: list[Piece], dtype: torch.dtype | None, into: Tensor, *, on_its_way: bool) -> None:
        if dtype is not None:
            self._gather(pieces, dtype, into, on_its_way=on_its_way)
            return
        for piece in pieces:
            self._copy_piece(piece, into, on_its_way=on_its_way)

    def _gather(self, pieces: list[Piece], dtype: torch.dtype, into: Tensor, *, on_its_way: bool) -> None:
        """Small chunks of one dtype and device, which follow each other in the slab, by one kernel."""
        first, last = pieces[0], pieces[-1]
        out = into[first.offset : last.offset + last.length].view(dtype)
        origins = self._plan.origins
        sources = [self._sources[origins[piece.chunk]].reshape(-1) for piece in pieces]
        if sources[0].device == out.device:
            torch.cat(sources, out=out)
        else:
            out.copy_(torch.cat(sources), non_blocking=on_its_way)

    def _copy_piece(self, piece: Piece, into: Tensor, *, on_its_way: bool) -> None:
        source = _source(self._plan, piece.chunk, self._sources)
        if source.address:
            ctypes.memmove(into.data_ptr() + piece.offset, source.address + piece.start, piece.length)
            return
        tensor = source.tensor
        size = tensor.element_size()
        begin = piece.start // size
        out = into[piece.offset : piece.offset + piece.length].view(tensor.dtype)
        for first, box in row_major_boxes(tensor.shape, begin, begin + piece.length // size):
            part = out[first - begin : first - begin + box.volume].view(box.sizes)
            values = tensor[_slices(box)]
            if on_its_way:  # torch would conjugate or negate what has not arrived yet (pytorch#146286)
                values = values.resolve_conj().resolve_neg()
            part.copy_(values, non_blocking=on_its_way)


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))


def _source(plan: SavePlan, number: int, sources: Sequence[Tensor]) -> _Source:
    origin = plan.origins[number]
    tensor = sources[origin].detach()
    chunk, parent = plan.chunks[number], plan.structure.chunks[origin]
    if chunk.box != parent.box:
        for dim, (start, size, base) in enumerate(
            zip(chunk.box.offsets, chunk.box.sizes, parent.box.offsets, strict=True)
        ):
            tensor = tensor.narrow(dim, start - base, size)
    assert tensor.numel() == prod(chunk.box.sizes)
    plain = not tensor.is_conj() and not tensor.is_neg()
    if plain and tensor.dtype not in GATHERED and tensor.element_size() in _SAME_SIZE:
        # torch has no copy for some of these, and all that matters are bits.
        tensor = tensor.view(_SAME_SIZE[tensor.element_size()])
    packed = plain and tensor.device.type == "cpu" and tensor.is_contiguous()
    return _Source(tensor, tensor.data_ptr() if packed else 0)
