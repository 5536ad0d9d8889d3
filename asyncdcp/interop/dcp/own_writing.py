"""asyncdcp's own format, written by the ranks of ``torch.distributed.checkpoint``: what each rank does.

Its items go into an image, and that into ``__dcp_<token>_<n>.part`` files. They have no name of the format, and no save
id, before the coordinator has heard of every rank (``own_commit.py``): so no plan carries one, which a planner that
caches its plans would carry to the next save.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Mapping, Sequence

import msgspec
import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from asyncdcp.boxes import Box
from asyncdcp.errors import UnsupportedValue
from asyncdcp.format.blocks import BLOCK_BYTES, pack_checksums
from asyncdcp.interop.dcp.new_files import NewFiles, ObjectStream
from asyncdcp.planning import ChunkSpec, SavePlan, Structure, TensorSpec
from asyncdcp.planning.save_plan import plan_save
from asyncdcp.state_dict.structure import DTYPE_NAMES
from asyncdcp.state_dict.tensors import memory
from asyncdcp.state_dict.values import encode_value


class StagedFile(msgspec.Struct, frozen=True):
    """A data file that has no place in a checkpoint yet: its name, its size, and its table of checksums."""

    name: str
    size: int
    checksums: bytes


class Part(msgspec.Struct, frozen=True):
    """What one rank has written: its files, and the encoded plan and values of its Index, still without a tree."""

    files: list[StagedFile]
    plan: bytes
    values: dict[str, msgspec.Raw]


def write_part(files: NewFiles, items: Sequence[WriteItem], planner: SavePlanner, ahead: int) -> list[WriteResult]:
    """Writes the items' tensors, and encodes their values. The first result carries the ``Part``."""
    values = {item.index.fqn: _encoded(item, planner) for item in items if item.type == WriteItemType.BYTE_IO}
    structure, sources = _structure([item for item in items if item.type != WriteItemType.BYTE_IO])
    plan = plan_save(structure)
    token = uuid.uuid4().hex
    staged = []
    for number, image in enumerate(plan.images):
        with files.create(f"__dcp_{token}_{number}.part", image.size, ahead) as stream:
            sums = _write_image(stream, plan, number, sources, planner)
        staged.append(StagedFile(stream.name, image.size, sums))
    part = Part(staged, plan.index_plan, values)
    return [
        WriteResult(index=item.index, size_in_bytes=_nbytes(item, values), storage_data=None if number else part)
        for number, item in enumerate(items)
    ]


def _structure(items: Sequence[WriteItem]) -> tuple[Structure, list[WriteItem]]:
    """What the items are of, and the item of each chunk. Empty chunks are in no file."""
    tensors: dict[str, TensorSpec] = {}
    numbers: dict[str, int] = {}
    chunks: dict[ChunkSpec, WriteItem] = {}
    for item in items:
        name, data = item.index.fqn, item.tensor_data
        assert data is not None
        dtype = data.properties.dtype
        if dtype not in DTYPE_NAMES:
            raise UnsupportedValue(f"{name} has dtype {dtype}, which asyncdcp's format does not have", tensors=[name])
        spec = TensorSpec(name, DTYPE_NAMES[dtype], tuple(data.size))
        if tensors.setdefault(name, spec) != spec:
            raise UnsupportedValue(
                f"the plan gives {name} two shapes or dtypes: {tensors[name]}, {spec}", tensors=[name]
            )
        number = numbers.setdefault(name, len(numbers))
        box = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
        if box.volume:
            chunks.setdefault(ChunkSpec(number, box), item)
    return Structure(tuple(tensors.values()), tuple(chunks), {}, None), list(chunks.values())


def _write_image(
    stream: ObjectStream, plan: SavePlan, number: int, sources: Sequence[WriteItem], planner: SavePlanner
) -> bytes:
    """Writes one file of the plan; the table of its checksums. One tensor is in memory beside what is being written."""
    image = plan.images[number]
    sums = _Checksums(stream)
    sums.write(image.header)
    for chunk in image.chunks:
        whole, part = plan.structure.chunks[plan.origins[chunk]].box, plan.chunks[chunk].box
        tensor = _resolve(sources[plan.origins[chunk]], planner)
        begins = [a - b for a, b in zip(part.offsets, whole.offsets, strict=True)]
        sums.write(memory(tensor[tuple(slice(a, a + size) for a, size in zip(begins, part.sizes, strict=True))]))
    return sums.finish()


class _Checksums:
    """Passes bytes on to a stream, and sums up each block of them."""

    def __init__(self, stream: ObjectStream) -> None:
        self._stream = stream
        self._block = xxhash.xxh3_64()
        self._filled = 0
        self._done: list[int] = []

    def write(self, data: memoryview | bytes) -> None:
        view = memoryview(data)
        begin = 0
        while begin < len(view):
            part = view[begin : begin + BLOCK_BYTES - self._filled]
            self._block.update(part)
            self._stream.write(part)
            self._filled += len(part)
            begin += len(part)
            if self._filled == BLOCK_BYTES:
                self._end_block()

    def finish(self) -> bytes:
        if self._filled:
            self._end_block()
        return pack_checksums(self._done)

    def _end_block(self) -> None:
        self._done.append(self._block.intdigest())
        self._block.reset()
        self._filled = 0


def _resolve(item: WriteItem, planner: SavePlanner) -> Tensor:
    """The chunk on the CPU, as the plan has it."""
    tensor, data, name = planner.resolve_data(item), item.tensor_data, item.index.fqn
    assert data is not None
    if not isinstance(tensor, Tensor) or hasattr(tensor, "__tensor_flatten__") or tensor.is_meta or tensor.is_quantized:
        raise UnsupportedValue(
            f"{name} is a {type(tensor).__qualname__} that has no bytes of its own; AsyncCheckpointer.save may know it",
            tensors=[name],
        )
    if (tensor.dtype, tuple(tensor.shape)) != (data.properties.dtype, tuple(data.chunk.sizes)):
        found, planned = f"{tensor.dtype}{list(tensor.shape)}", f"{data.properties.dtype}{list(data.chunk.sizes)}"
        raise UnsupportedValue(f"the planner gives {found} for {name}, and has planned {planned}", tensors=[name])
    return tensor.detach().cpu()


def _encoded(item: WriteItem, planner: SavePlanner) -> msgspec.Raw:
    """The value as asyncdcp stores it, from what planners give: the bytes of ``torch.save``."""
    name, data = item.index.fqn, planner.resolve_data(item)
    assert isinstance(data, io.BytesIO)
    try:  # the planner has made these bytes of this process's objects, just now: there is no stranger's code in them
        value = torch.load(io.BytesIO(data.getvalue()), map_location="cpu", weights_only=False)
    except Exception as error:
        message = f"the planner's bytes of {name} are not torch.save's, and cannot be converted ({error!s:.200})"
        raise UnsupportedValue(message, tensors=[name]) from error
    return msgspec.Raw(msgspec.json.encode(encode_value(value, name, allow_pickle=True)))


def _nbytes(item: WriteItem, values: Mapping[str, msgspec.Raw]) -> int:
    data = item.tensor_data
    if data is None:
        return len(bytes(values[item.index.fqn]))
    return data.chunk.sizes.numel() * data.properties.dtype.itemsize
