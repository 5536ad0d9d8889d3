"""The sender's blocks: copied into buffers, or the tensors' own memory where that is what is to be sent."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from asyncdcp.format.blocks import checksum
from asyncdcp.planning import Slab
from asyncdcp.staging import SlabCopier, Sources
from asyncdcp.staging.accelerator import wait_on_host
from asyncdcp.transport import wire
from asyncdcp.transport.shared import SharedBlocks, SharedPool
from asyncdcp.transport.stream import Stream


class Batch(NamedTuple):
    """Batch ``number`` (from 1 on) as it is sent: contiguous bytes, and their checksums."""

    number: int
    blocks: list[Tensor]
    digests: tuple[int, ...]


class Stager:
    """Makes the batches of one transfer, one after another, on threads.

    ``whole``: each batch gets memory of its own, and no tensor is sent from where it lies. Else the buffers of batch n
    are used again for batch n + 2, and ``staged`` batches may refer to tensors until they are sent. As long as batches
    are shared, all blocks are copied to the shared memory, for receivers over the link too.
    """

    def __init__(
        self, stream: Stream, device: torch.device, pool: SharedPool | None, *, whole: bool, checksums: bool
    ) -> None:
        self._stream = stream
        self._pool = pool
        self._device = device
        self._whole = whole
        self._checksums = checksums
        self._copier: SlabCopier | None = None
        self._sources: list[Tensor] = []
        self._changed: Callable[[], list[int]] = list
        self._buffers: dict[int, Tensor] = {}
        self._shared: SharedBlocks | None = None
        self._spare: Tensor | None = None

    def share(self) -> wire.SharedMemory | None:
        """Takes shared memory, if there is to be some; what a receiver opens it by."""
        self._shared = None if self._pool is None else self._pool.take()
        offer = None if self._shared is None else self._shared.offer()
        if offer is None and self._shared is not None:
            self._shared.close()
            self._shared = None
        return offer

    def reserve(self) -> None:
        """Before anything is promised: memory for ``blank``, which is to do where there is none left. On the host no
        page of it is touched until then.
        """
        self._spare = torch.empty(self._stream.largest, dtype=torch.uint8, device=self._device)

    def begin(self, sources: Sources) -> None:
        """Looks at the tensors as copying begins. ``sources`` are kept until ``end``."""
        self._sources = list(sources.tensors)
        self._changed = sources.witness()
        self._copier = SlabCopier(self._stream.plan, self._sources, sources.fence)
        if self._device.type != "cpu":  # what is sent from where it lies does not wait for the fence by itself
            wait_on_host([(work, sources.fence.marks[device]) for device, work in sources.fence.work.items()])

    def stage(self, number: int, *, shared: bool) -> Batch:
        """The batch, all of it there. ``shared`` as long as there may be a receiver that takes it so."""
        if not shared and self._shared is not None:  # earlier batches may still be on their way from there
            self._shared.close()
            self._shared = None
        blocks, digests = [], []
        for block in self._stream.batches[number - 1]:
            blocks.append(self._block(block))
            if self._checksums:
                digests.append(checksum_of(blocks[-1]))  # while it is in the cache
        return Batch(number, blocks, tuple(digests))

    def blank(self, number: int) -> Batch:
        """In the place of one that could not be staged: as many bytes, of no meaning."""
        assert self._spare is not None
        blocks = [self._stream.blocks[block] for block in self._stream.batches[number - 1]]
        return Batch(number, [self._spare[: block.length] for block in blocks], ())

    def torn(self) -> list[str]:
        """The tensors that are seen to have changed since ``begin``."""
        structure = self._stream.plan.structure
        return [structure.tensors[structure.chunks[number].tensor].name for number in self._changed()]

    def end(self) -> None:
        """Lets go of all memory."""
        self._copier, self._sources, self._changed = None, [], list
        self._buffers.clear()
        self._spare = None
        if self._pool is not None and self._shared is not None:
            self._pool.give(self._shared)
        self._shared = None

    def _block(self, number: int) -> Tensor:
        block = self._stream.blocks[number]
        if self._shared is not None:
            buffer = self._shared.take(number, block.length)
            self._copy(block, buffer)
            return buffer
        direct = None if self._whole else self._direct(block)
        if direct is not None:
            return direct
        if self._device.type == "cpu" or self._all_there(block):
            assert self._copier is not None
            with self._copier.on(self._device):  # what is freed on one stream may be in use there for a while
                buffer = self._buffer(number, block.length)
            self._copy(block, buffer)
        else:
            host = torch.empty(block.length, dtype=torch.uint8)
            self._copy(block, host)
            buffer = self._buffer(number, block.length)
            buffer.copy_(host)
        return buffer

    def _copy(self, block: Slab, into: Tensor) -> None:
        assert self._copier is not None
        arrival = self._copier.copy(block, into)
        if arrival is not None:
            arrival()

    def _buffer(self, number: int, length: int) -> Tensor:
        if self._whole:
            return torch.empty(length, dtype=torch.uint8, device=self._device)
        slot = number % (wire.AHEAD * wire.BATCH_BLOCKS)
        found = self._buffers.get(slot)
        if found is None or len(found) < length:
            found = self._buffers[slot] = torch.empty(length, dtype=torch.uint8, device=self._device)
        return found[:length]

    def _direct(self, block: Slab) -> Tensor | None:
        """The memory of a tensor, if the block is a run of it."""
        if len(block.pieces) != 1:
            return None
        [piece] = block.pieces
        tensor = self._sources[piece.chunk].detach()
        if tensor.device != self._device or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            return None
        return bytes_at(tensor, piece.start, piece.length)

    def _all_there(self, block: Slab) -> bool:
        return all(self._sources[piece.chunk].device == self._device for piece in block.pieces)


def bytes_at(tensor: Tensor, first: int, length: int) -> Tensor:
    """A run of the bytes of a contiguous tensor, which the caller keeps alive."""
    if tensor.is_cpu:
        memory = (ctypes.c_char * length).from_address(tensor.data_ptr() + first)
        return torch.frombuffer(memory, dtype=torch.uint8)
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset()).view(torch.uint8)
    return flat[first : first + length]


def checksum_of(data: Tensor) -> int:
    """XXH3-64 of a block, wherever it is."""
    return checksum(data.cpu().numpy().data)
