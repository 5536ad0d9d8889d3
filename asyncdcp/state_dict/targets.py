"""The tensors that a load fills: matched by name with what the checkpoint holds, then written to, straight or piece by
piece.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from asyncdcp.boxes import Box, intersect, row_major_boxes
from asyncdcp.errors import UnsupportedFormat
from asyncdcp.metadata import Metadata, TensorStorageMetadata
from asyncdcp.planning import Want
from asyncdcp.state_dict.chunks import empty_like, local_chunks
from asyncdcp.state_dict.structure import DTYPES


class TensorTarget:
    """Fills one tensor. The caller keeps the tensor alive and unused until the load is done."""

    __slots__ = ("_box", "_dtype", "_tensor", "packed")

    def __init__(self, tensor: Tensor, box: Box, dtype: torch.dtype) -> None:
        self._tensor = tensor
        self._box = box
        self._dtype = dtype
        self.packed = tensor.dtype == dtype and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
        """Whether its memory is what is stored, so that it can be written as it is."""

    @property
    def buffer(self) -> memoryview | None:
        """As ``pipeline.load.Target``."""
        return _memory(self._tensor) if self.packed and self._tensor.is_cpu else None

    @property
    def address(self) -> int:
        """Where ``buffer`` begins; 0 where there is none."""
        return self._tensor.data_ptr() if self.packed and self._tensor.is_cpu else 0

    def device_bytes(self) -> Tensor | None:
        """Its memory as bytes where it is on a device; None where it is not ``packed``, or on the host."""
        if not self.packed or self._tensor.is_cpu:
            return None
        return self._tensor.detach().as_strided((self._tensor.numel(),), (1,)).view(torch.uint8)

    def deliver(self, chunk: Box, start: int, data: memoryview) -> None:
        """Copies whole elements of ``chunk``, from its byte ``start`` on, to where they belong in the tensor."""
        elements = torch.frombuffer(data, dtype=torch.uint8).view(self._dtype)
        first = start // self._dtype.itemsize
        tensor = self._tensor.detach()
        same = tensor.dtype == self._dtype
        target = copyable(tensor) if same else tensor
        with torch.no_grad():
            for begin, box in row_major_boxes(chunk.sizes, first, first + len(elements)):
                absolute = Box(tuple(a + b for a, b in zip(chunk.offsets, box.offsets, strict=True)), box.sizes)
                common = intersect(absolute, self._box)
                if common is not None:
                    piece = elements[begin - first : begin - first + box.volume].view(box.sizes)
                    source = copyable(piece) if same else piece
                    target[_slices(common, self._box)].copy_(source[_slices(common, absolute)])
        if not target.is_cpu:  # strided and converted ones are finished by a kernel
            torch.accelerator.current_stream(target.device).synchronize()


def copyable(tensor: Tensor) -> Tensor:
    """The tensor itself, or as bytes if torch has no copy for its dtype, as for the integers of less than a byte."""
    if tensor.dtype.itemsize == 1 and tensor.dtype not in _COPIED:
        return tensor.view(torch.uint8)
    return tensor


_COPIED = {torch.bool, torch.uint8, torch.int8}


def _slices(inner: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(
        slice(start - origin, start - origin + size)
        for start, size, origin in zip(inner.offsets, inner.sizes, outer.offsets, strict=True)
    )


def _memory(tensor: Tensor) -> memoryview | None:
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0:
        return None
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")


def new_tensors(
    metadata: Metadata, devices: Mapping[str, torch.device], alike: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """An uninitialised tensor for each stored one, where it is to be; placed and laid out as the one that ``alike`` has
    for it.
    """
    made = {}
    for name, device in devices.items():
        dtype, model = _dtype(metadata, name), (alike or {}).get(name)
        made[name] = (
            torch.empty(_stored(metadata, name).size, dtype=dtype, device=device)
            if model is None
            else empty_like(model, dtype, device)
        )
    return made


def targets_of(metadata: Metadata, tensors: Iterable[tuple[str, Tensor]]) -> tuple[list[Want], list[TensorTarget]]:
    """Wants and targets for tensors, each with the name under which it is stored: for what this process holds of each,
    and nothing for what is empty.

    Waits until accelerators have done what was enqueued before, on whatever stream: it may use the targets.
    """
    wants, targets = [], []
    tensors = [*tensors]
    for device in {tensor.device for _, tensor in tensors if not tensor.is_cpu and not tensor.is_meta}:
        torch.accelerator.synchronize(device)
    for name, tensor in tensors:
        for box, local in local_chunks(tensor):
            if box.volume:
                wants.append(Want(name, box))
                targets.append(TensorTarget(local, box, _dtype(metadata, name)))
    return wants, targets


def _stored(metadata: Metadata, name: str) -> TensorStorageMetadata:
    entry = metadata.state_dict_metadata[name]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


def _dtype(metadata: Metadata, name: str) -> torch.dtype:
    """``UnsupportedFormat`` if this torch does not have it."""
    stored = _stored(metadata, name).properties.dtype
    dtype = DTYPES.get(stored)
    if dtype is None:
        raise UnsupportedFormat(f"{name} has dtype {stored}, which this torch does not have", tensors=[name])
    return dtype
