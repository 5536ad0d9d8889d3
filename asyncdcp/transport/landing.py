"""Where what is received goes: a place for every byte that somebody wants, and for each block whether it can be
received straight into a tensor.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from asyncdcp.boxes import Box, intersect, tiles
from asyncdcp.errors import StateMismatch
from asyncdcp.planning import Want, plan_load
from asyncdcp.state_dict.targets import TensorTarget
from asyncdcp.transport.offered import Offered


class Part(NamedTuple):
    """Bytes ``begin <= i < end`` of the stream. Those of a target's own memory have an ``offset`` there, and can be
    copied or received as they are; others (-1) are bytes of the chunk ``chunk``, from its byte ``start`` on.
    """

    begin: int
    end: int
    target: TensorTarget
    offset: int
    chunk: Box
    start: int


class Landing:
    """``device`` is where blocks arrive."""

    def __init__(
        self, offered: Offered, wants: Sequence[Want], targets: Sequence[TensorTarget], device: torch.device
    ) -> None:
        self._borders = offered.borders
        self._device = device
        self._by_block: list[list[Part]] = [[] for _ in offered.borders[1:]]
        for part in _parts(offered, wants, targets):
            first = bisect_right(self._borders, part.begin) - 1
            for block in range(first, len(self._by_block)):
                if self._borders[block] >= part.end:
                    break
                self._by_block[block].append(part)

    def in_place(self, block: int) -> Tensor | None:
        """The memory into which the block can be received, if all of it belongs there and nowhere else."""
        parts, (begin, end) = self._by_block[block], self._borders[block : block + 2]
        if len(parts) != 1 or parts[0].begin > begin or parts[0].end < end or parts[0].offset < 0:
            return None
        part = parts[0]
        memory = _memory(part.target, self._device)
        first = part.offset + begin - part.begin
        return None if memory is None else memory[first : first + end - begin]

    def deliver(self, block: int, data: Tensor) -> None:
        """Copies the bytes of a block to where they belong. Blocks; on a thread."""
        begin, end = self._borders[block : block + 2]
        address = data.data_ptr() if data.is_cpu else 0
        for part in self._by_block[block]:
            first, last = max(begin, part.begin), min(end, part.end)
            to = part.target.address if part.offset >= 0 else 0
            if to and address:
                ctypes.memmove(to + part.offset + first - part.begin, address + first - begin, last - first)
            else:
                _deliver(part, data[first - begin : last - begin], first, self._device)


def _deliver(part: Part, data: Tensor, first: int, device: torch.device) -> None:
    memory = _memory(part.target, device) if part.offset >= 0 else None
    if memory is not None:
        at = part.offset + first - part.begin
        memory[at : at + len(data)].copy_(data)
        return
    part.target.deliver(part.chunk, part.start + first - part.begin, data.cpu().numpy().data)


def _memory(target: TensorTarget, device: torch.device) -> Tensor | None:
    """A target's memory as bytes, if it is on ``device`` and as the stream has it."""
    if (buffer := target.buffer) is not None:
        return torch.frombuffer(buffer, dtype=torch.uint8) if device.type == "cpu" else None
    flat = target.device_bytes()
    return flat if flat is not None and flat.device == device else None


def _parts(offered: Offered, wants: Sequence[Want], targets: Sequence[TensorTarget]) -> Iterator[Part]:
    """Most tensors are wanted as they are sent; for the others the load's planning is asked."""
    rest: list[int] = []
    for number, (want, target) in enumerate(zip(wants, targets, strict=True)):
        held = offered.of[want.name]
        chunk = offered.chunks[held[0]] if len(held) == 1 else None
        if chunk is not None and chunk.box == want.box:
            yield Part(chunk.begin, chunk.end, target, 0 if target.packed else -1, chunk.box, 0)
        else:
            _check_covered(offered, want, (offered.chunks[each].box for each in held))
            rest.append(number)
    for item in plan_load(offered.metadata, [wants[number] for number in rest]).items:
        target = targets[rest[item.want]]
        offset = item.target if target.packed else -1
        yield Part(item.begin, item.end, target, offset, item.chunk, item.start)


def _check_covered(offered: Offered, want: Want, held: Iterable[Box]) -> None:
    common = [box for chunk in held if (box := intersect(chunk, want.box)) is not None]
    if not tiles(want.box, common):
        there = sum(box.volume for box in common)
        raise StateMismatch(
            f"rank {offered.rank} holds {there} of the {want.box.volume} elements of {want.name} that are wanted here "
            f"(from {list(want.box.offsets)}, {list(want.box.sizes)}): receive from a rank that holds the same "
            "shard, or load a checkpoint",
            mismatched=[want.name],
        )
