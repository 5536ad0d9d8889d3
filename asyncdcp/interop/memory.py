"""The bytes of a tensor as they are written and compared: packed, row-major, not copied where they are so already."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def memory(tensor: Tensor) -> memoryview:
    """Its elements; the view keeps them alive. ValueError for a tensor that has no memory on the CPU."""
    if not tensor.is_cpu or tensor.layout is not torch.strided or tensor.is_quantized:
        raise ValueError(f"a tensor of layout {tensor.layout} on {tensor.device} has no such bytes")
    packed = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if not packed.nbytes:
        return memoryview(b"")
    block = (ctypes.c_char * packed.nbytes).from_address(packed.data_ptr())
    block._tensor = packed  # type: ignore[attr-defined]  # it keeps the memory alive
    return memoryview(block).cast("B")
