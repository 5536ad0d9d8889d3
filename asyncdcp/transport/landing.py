"""Where what is received goes: a place for every byte that somebody wants, and for each block whether it can be
received straight into a tensor.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, cast

import torch
from torch import Tensor

from asyncdcp.boxes import Box, intersect, tiles
from asyncdcp.errors import StateMismatch
from asyncdcp.planning import Want, plan_load
from asyncdcp.staging.copier import GATHERED
from asyncdcp.state_dict.structure import DTYPES, PLAIN
from asyncdcp.state_dict.targets import TensorTarget, targets_of
from asyncdcp.transport.blocks import bytes_at
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
    """``device`` is where blocks arrive.

    There are two cases. A tensor that is sent whole, and is in memory as the stream has it, is all that is known of its
    chunk. For the others there are parts; also for further tensors that want the same, as where what the sender has
    tied is not tied here.
    """

    def __init__(self, offered: Offered, targets: Sequence[tuple[str, Tensor]], device: torch.device) -> None:
        self._layout = layout = offered.layout
        self._device = device
        self._whole: list[Tensor | None] = [None] * (len(layout.begins) - 1)
        self._parts: dict[int, list[Part]] = {}
        for each in {tensor.device for _, tensor in targets if not tensor.is_cpu}:
            torch.accelerator.synchronize(each)
        dtypes = [DTYPES.get(dtype) for dtype in layout.plan.dtypes]
        rest = []
        for name, tensor in targets:
            chunk = layout.sole.get(name, -1)
            free = chunk >= 0 and self._whole[chunk] is None
            if free and _is_packed(tensor, dtypes[layout.plan.chunks.tensor[chunk]], device):
                self._whole[chunk] = tensor
            elif tensor.numel():
                rest.append((name, tensor))
        if rest:
            self._add_parts(_parts(offered, *targets_of(offered.metadata, rest)))

    def _add_parts(self, parts: Iterable[Part]) -> None:
        borders = self._layout.borders
        for part in parts:
            for block in range(bisect_right(borders, part.begin) - 1, bisect_left(borders, part.end)):
                self._parts.setdefault(block, []).append(part)

    def in_place(self, block: int) -> Tensor | None:
        """The memory into which the block can be received, if all of it belongs there and nowhere else."""
        begin, end = self._layout.borders[block : block + 2]
        chunks, parts = self._layout.chunks_in(block), self._parts.get(block, ())
        if len(chunks) == 1 and (tensor := self._whole[chunks[0]]) is not None:
            first = begin - self._layout.begins[chunks[0]]
            return None if parts else bytes_at(tensor, first, end - begin)
        if len(parts) != 1 or parts[0].begin > begin or parts[0].end < end or parts[0].offset < 0:
            return None
        part = parts[0]
        memory = _memory(part.target, self._device)
        first = part.offset + begin - part.begin
        return None if memory is None else memory[first : first + end - begin]

    def deliver(self, block: int, data: Tensor) -> None:
        """Copies the bytes of a block to where they belong. Blocks; on a thread."""
        begin, end = self._layout.borders[block : block + 2]
        for part in self._parts.get(block, ()):
            first, last = max(begin, part.begin), min(end, part.end)
            _deliver(part, data[first - begin : last - begin], first, self._device)
        begins, wholes = self._layout.begins, self._whole

        def kind(number: int) -> torch.dtype | None:
            tensor = wholes[number]
            if tensor is None or begins[number] < begin or begins[number + 1] > end or tensor.dtype not in GATHERED:
                return None
            return None if (begins[number] - begin) % tensor.element_size() else tensor.dtype

        for dtype, group in groupby(self._layout.chunks_in(block), kind):
            numbers = list(group)
            if dtype is not None:
                self._scatter(data[begins[numbers[0]] - begin : begins[numbers[-1] + 1] - begin].view(dtype), numbers)
                continue
            for number in numbers:
                if (tensor := wholes[number]) is not None:
                    first, last = max(begin, begins[number]), min(end, begins[number + 1])
                    piece = data[first - begin : last - begin]
                    bytes_at(tensor, first - begins[number], last - first).copy_(piece)

    def _scatter(self, data: Tensor, numbers: Sequence[int]) -> None:
        """Whole tensors of one dtype, which follow each other, by one call: the GIL is let go once for all of them."""
        found = cast("list[Tensor]", [self._whole[number] for number in numbers])
        with torch.inference_mode():
            flat = [tensor if tensor.dim() == 1 else tensor.view(-1) for tensor in found]
            torch.split_with_sizes_copy(data, [len(tensor) for tensor in flat], out=flat)


def _is_packed(tensor: Tensor, dtype: torch.dtype | None, device: torch.device) -> bool:
    """Whether it is plain, and its memory what is sent, on ``device``."""
    return (
        type(tensor) in PLAIN
        and tensor.dtype is dtype
        and tensor.device == device
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


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
    """Some are wanted as they are sent; for the others the load's planning is asked."""
    layout, rest = offered.layout, []
    for number, (want, target) in enumerate(zip(wants, targets, strict=True)):
        held = layout.of[want.name]
        chunk = layout.chunks[held[0]] if len(held) == 1 else None
        if chunk is not None and chunk.box == want.box:
            yield Part(chunk.begin, chunk.end, target, 0 if target.packed else -1, chunk.box, 0)
        else:
            _check_covered(offered, want, (layout.chunks[each].box for each in held))
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
            "shard, or what full_tensor() gives there, or load a checkpoint",
            mismatched=[want.name],
        )
