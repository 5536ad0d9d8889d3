"""Which tensors can be stored, which of them are one (alias groups by the memory that they show), and a tensor's bytes
as they are written and compared.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch
from torch import Tensor

from asyncdcp.state_dict.chunks import is_checkpointable
from asyncdcp.state_dict.leaves import Refusal

_PLAIN: frozenset[type] = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer})

# Addresses below this are no memory's, or are rare enough to look at the tensor more closely. A tensor whose storage
# was freed (resized to nothing, as FSDP does) has its offset as its address.
_SUSPECT = 1 << 40

_NO_MEMORY = "it has no memory, as in tracing and functional transforms; clone() it, or save outside of them"


def tensor_kinds() -> frozenset[type]:
    """The exact types that can be stored as they are; DTensor is one where it has been imported."""
    dtensor = _dtensor()
    return _PLAIN if dtensor is None else _PLAIN | {dtensor}


def _dtensor() -> Any:
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


class AliasGroups:
    """The tensors of a state by FQN, each distinct one once.

    Two tensors are one where they show the very same memory in the same way: storage, offset, shape, strides, dtype,
    device, conjugate and negative bits, and for DTensors mesh and placements. The first FQN added holds the group.
    Tensors without elements are each their own, but for DTensors whose local shard alone is empty, since on other
    ranks it is not.
    """

    def __init__(self, *, allow_meta: bool = False) -> None:
        self._allow_meta = allow_meta
        self.tensors: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        self._by_address: dict[int, str] = {}
        self._by_view: dict[tuple[Any, ...], str] = {}

    def add(self, fqn: str, tensor: Tensor) -> None:
        """Add a tensor of one of ``tensor_kinds()``. Raises ``Refusal`` where its content cannot be stored as it is."""
        if type(tensor) not in _PLAIN:
            self._add_dtensor(fqn, tensor)
            return
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            raise Refusal(_layout_reason(tensor))
        try:
            address = tensor.data_ptr()
        except RuntimeError as error:
            raise Refusal(_NO_MEMORY) from error
        if address < _SUSPECT:
            replaced = tensor.is_meta and self._allow_meta
            if not replaced:
                _check_memory(tensor)
            if replaced or tensor.numel() == 0:
                self.tensors[fqn] = tensor
                return
        # There are three cases: an address not seen before (all but a few), an alias, and another view with the same
        # start. Only the latter two read the rest of what makes a view.
        first = self._by_address.setdefault(address, fqn)
        if first is fqn:
            self.tensors[fqn] = tensor
            return
        self._by_view.setdefault(_view(self.tensors[first]), first)
        self._join(fqn, tensor, _view(tensor))

    def _join(self, fqn: str, tensor: Tensor, view: tuple[Any, ...]) -> None:
        holder = self._by_view.setdefault(view, fqn)
        if holder is fqn:
            self.tensors[fqn] = tensor
        else:
            self.aliases[fqn] = holder

    def _add_dtensor(self, fqn: str, tensor: Any) -> None:
        local = getattr(tensor, "_local_tensor", tensor)
        if is_checkpointable(local):
            self.tensors[fqn] = tensor  # its shards are its own affair, ties among them too
            return
        if type(local) not in _PLAIN:
            kind = type(local)
            raise Refusal(f"its local tensor is a {kind.__module__}.{kind.__qualname__}")
        if any(placement.is_partial() for placement in tensor.placements):
            raise Refusal(f"its placements {tensor.placements} hold partial results; redistribute() it first")
        if local.layout is not torch.strided or local.is_quantized or local.is_nested:
            raise Refusal(_layout_reason(local))
        _check_memory(local)
        if tensor.numel() == 0:
            self.tensors[fqn] = tensor
            return
        # The storage object and not its address, which an empty local shard lacks.
        storage = local.untyped_storage()._cdata
        self._join(fqn, tensor, (storage, *_view(local), tensor.shape, tensor.device_mesh, tensor.placements))


def _view(tensor: Tensor) -> tuple[Any, ...]:
    return (
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        tensor.is_conj(),
        tensor.is_neg(),
    )


def _check_memory(tensor: Tensor) -> None:
    """Raises ``Refusal`` unless there is memory behind every element."""
    if tensor.is_meta:
        raise Refusal("it is on the meta device and holds no data; materialize it with to_empty() and fill it")
    if tensor.numel() == 0:
        return
    if torch._is_functional_tensor(tensor) or tensor._is_zerotensor():
        raise Refusal(_NO_MEMORY)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if (tensor.storage_offset() + last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise Refusal("its memory has been freed; gather or unshard it first")


def _layout_reason(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "it is nested (jagged); store values() and offsets(), or unbind() it"
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}; store to_dense(), or its indices and values"
    return f"it is quantized ({tensor.dtype}); store int_repr() with scale and zero point, or dequantize()"


def memory(tensor: Tensor) -> memoryview:
    """Its elements, packed and row-major, not copied where they are so already; the view keeps them alive. ValueError
    for a tensor that has no memory on the CPU.
    """
    if not tensor.is_cpu or tensor.layout is not torch.strided or tensor.is_quantized:
        raise ValueError(f"a tensor of layout {tensor.layout} on {tensor.device} has no such bytes")
    packed = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if not packed.nbytes:
        return memoryview(b"")
    block = (ctypes.c_char * packed.nbytes).from_address(packed.data_ptr())
    block._tensor = packed  # type: ignore[attr-defined]  # it keeps the memory alive
    return memoryview(block).cast("B")
