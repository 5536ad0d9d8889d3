"""The chunks of a tensor that this process holds: of a plain tensor all of it, of a ``DTensor`` what its placements
leave here, of torch's ``_Checkpointable`` tensors what they say themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asyncdcp.boxes import Box, whole
from asyncdcp.planning.sharding import Split, held_boxes, local_shape
from asyncdcp.state_dict.leaves import Refusal


class LocalChunk(NamedTuple):
    """A box of the whole tensor, and the tensor that holds exactly its elements: a view of the local memory."""

    box: Box
    tensor: Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``. Does not import what nobody has imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_checkpointable(tensor: Any) -> bool:
    """Whether it says itself of which chunks it consists, by torch's ``_Checkpointable`` protocol."""
    return hasattr(type(tensor), "__create_write_items__") and hasattr(type(tensor), "__get_tensor_shard__")


def layout(tensor: Tensor) -> Any:
    """What its chunks depend on besides its shape; comparable with ``==``. None for plain tensors."""
    if is_dtensor(tensor):
        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]  # a DTensor's
        if not is_checkpointable(tensor._local_tensor):  # type: ignore[attr-defined]  # likewise
            return mesh, placements
    elif not is_checkpointable(tensor):
        return None
    return [chunk.box for chunk in local_chunks(tensor)]


def local_chunks(tensor: Tensor) -> list[LocalChunk]:
    """Its chunks, disjoint; of a sharded tensor none where nothing of it is here. Raises ``Refusal`` where they cannot
    be told.
    """
    if is_dtensor(tensor) and not is_checkpointable(tensor._local_tensor):  # type: ignore[attr-defined]  # a DTensor's
        return _dtensor_chunks(tensor)
    if is_checkpointable(tensor):
        return [chunk for chunk in _declared_chunks(tensor) if chunk.box.volume]
    return [LocalChunk(whole(tensor.shape), tensor)]


def empty_like(target: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor without content, of the target's shape and placement; with its strides, as ``torch.empty_like``."""
    if not is_dtensor(target):
        return torch.empty_like(target, dtype=dtype, device=device)
    from torch.distributed.tensor import DTensor

    dtensor: Any = target
    like: Tensor = dtensor._local_tensor
    if is_checkpointable(like):  # torchrec's shards know no empty_like
        like = torch.empty(like.shape, device="meta")
    local = torch.empty_like(like, dtype=dtype, device=device)
    return DTensor.from_local(
        local,
        dtensor.device_mesh,
        dtensor.placements,
        run_check=False,
        shape=dtensor.shape,
        stride=dtensor.stride(),
    )


def _dtensor_chunks(tensor: Any) -> list[LocalChunk]:
    local: Tensor = tensor._local_tensor
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # this rank is not of its mesh
        return []
    splits = list(_splits(tensor.placements, tensor.device_mesh.shape, coordinate))
    expected = local_shape(tensor.shape, splits)
    if tuple(local.shape) != expected:
        raise Refusal(
            f"its local tensor has the shape {list(local.shape)}, and {list(expected)} follows from its placements "
            f"{tensor.placements}; redistribute() it"
        )
    chunks = []
    for box, place in held_boxes(tensor.shape, splits):
        if box.volume:
            chunks.append(LocalChunk(box, _narrowed(local, place)))
    return chunks


def _narrowed(local: Tensor, place: Box) -> Tensor:
    for dim, (start, size) in enumerate(zip(place.offsets, place.sizes, strict=True)):
        if size != local.shape[dim]:
            local = local.narrow(dim, start, size)
    return local


def _splits(placements: Iterable[Any], counts: Iterable[int], coordinate: Iterable[int]) -> Iterator[Split]:
    for placement, count, index in zip(placements, counts, coordinate, strict=True):
        if placement.is_replicate():
            continue
        if placement.is_partial():
            raise Refusal(f"its placement {placement} holds partial results; redistribute() it first")
        kind = type(placement).__name__
        if kind not in ("Shard", "_StridedShard"):
            raise Refusal(f"its placement {placement} is not known; redistribute() it to Shard or Replicate")
        yield Split(placement.dim, count, index, int(getattr(placement, "split_factor", 1)))


def _declared_chunks(tensor: Any) -> Iterator[LocalChunk]:
    for item in tensor.__create_write_items__("", tensor):
        data = item.tensor_data
        if data is None:
            raise Refusal("its __create_write_items__ gives something else than chunks of tensors")
        shard = tensor.__get_tensor_shard__(item.index)
        box = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
        if tuple(data.size) != tuple(tensor.shape) or (box.volume and tuple(shard.shape) != box.sizes):
            raise Refusal(f"its chunk at {list(box.offsets)} does not fit its shape {list(tensor.shape)}")
        yield LocalChunk(box, shard)
