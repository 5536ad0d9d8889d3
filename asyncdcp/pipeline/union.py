"""From the indexes of all ranks to one view of the checkpoint, with nothing taken on trust.

``check_index`` holds an Index against its own numbers: every chunk within its tensor, every byte range within its file,
the ranges tiling the file without overlap or hole, tables as long as the file has blocks. ``unite`` holds the indexes
against each other: one shape and dtype per name, every tensor covered exactly. What passes can be read without further
thought.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple, NoReturn

from asyncdcp.boxes import Box, covers, overlapping, whole
from asyncdcp.errors import CorruptCheckpoint, UnsupportedFormat
from asyncdcp.format.blocks import SLAB_BYTES, block_count, unpack_checksums
from asyncdcp.metadata import (
    DTYPE_SIZES,
    BytesStorageMetadata,
    ChunkLocation,
    ChunkStorageMetadata,
    Index,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from asyncdcp.names import data_name, index_name

_LIMIT = 1 << 62
_BLOCK_LIMITS = (4096, SLAB_BYTES)


class FileMap(NamedTuple):
    """A data file, checked: its decoded size, block size and block checksums, and the chunks in it, sorted by begin."""

    name: str
    size: int
    block_bytes: int
    checksums: Sequence[int]
    begins: list[int]
    tensors: list[str]


@dataclass
class Union:
    """All indexes as one. ``tensor_bytes`` counts every tensor once; files are by name."""

    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = field(default_factory=dict)
    storage: dict[MetadataIndex, ChunkLocation] = field(default_factory=dict)
    files: dict[str, FileMap] = field(default_factory=dict)
    tensor_bytes: int = 0


class _Chunk(NamedTuple):
    tensor: int
    box: Box
    file: int
    begin: int
    length: int


def unite(indexes: Sequence[Index]) -> Union:
    """The union of all ranks' indexes, each checked, in the order of ranks. Of identical duplicates the lowest rank's
    counts.
    """
    union = Union()
    boxes: dict[str, list[tuple[Box, ChunkLocation]]] = {}
    declared: dict[str, tuple[str, tuple[int, ...]]] = {}
    for index in indexes:
        name = index_name(index.save_id, index.rank)
        chunks = check_index(index)
        plan = index.plan
        for tensor, dtype, shape in zip(plan.names, plan.dtypes, plan.shapes, strict=True):
            if declared.setdefault(tensor, (dtype, shape)) != (dtype, shape):
                _corrupt(name, f"{tensor} is {dtype}{list(shape)} here and {declared[tensor]} on a lower rank", tensor)
        for file in _file_maps(index, chunks):
            union.files[file.name] = file
        for chunk in chunks:
            location = ChunkLocation(index.files[chunk.file].name, chunk.begin, chunk.length)
            boxes.setdefault(plan.names[chunk.tensor], []).append((chunk.box, location))
        union.tensors.update({key: BytesStorageMetadata(len(value)) for key, value in index.values.items()})
    for tensor, (dtype, shape) in declared.items():
        _place(union, tensor, dtype, shape, boxes.get(tensor, []))
    return union


def _place(
    union: Union, tensor: str, dtype: str, shape: tuple[int, ...], found: list[tuple[Box, ChunkLocation]]
) -> None:
    """Adds one tensor to the union, once its chunks are seen to cover it without overlapping."""
    if tensor in union.tensors:
        raise CorruptCheckpoint(f"{tensor} is stored both as a tensor and as a value", tensors=[tensor])
    placed: dict[tuple[int, ...], tuple[Box, ChunkLocation]] = {}
    for box, location in found:
        known = placed.setdefault(box.offsets, (box, location))
        if known[0] != box:
            raise CorruptCheckpoint(f"{tensor}: overlapping chunks at {list(box.offsets)}", tensors=[tensor])
    chunks = [box for box, _ in placed.values()]
    if len(chunks) != 1 or chunks[0] != whole(shape):
        if overlapping(chunks) is not None:
            raise CorruptCheckpoint(f"{tensor}: overlapping chunks", tensors=[tensor])
        if sum(box.volume for box in chunks) != prod(shape) or not covers(whole(shape), chunks):
            raise CorruptCheckpoint(f"{tensor}: its chunks do not cover its shape {list(shape)}", tensors=[tensor])
    for box, location in placed.values():
        union.storage[MetadataIndex(tensor, box.offsets)] = location
    stored = tuple(ChunkStorageMetadata(box.offsets, box.sizes) for box in chunks)
    union.tensors[tensor] = TensorStorageMetadata(TensorProperties(dtype), shape, stored)
    union.tensor_bytes += prod(shape) * DTYPE_SIZES[dtype]


def check_index(index: Index) -> list[_Chunk]:
    """The chunks of an Index, all its numbers checked against each other; ``CorruptCheckpoint`` otherwise."""
    name, plan = index_name(index.save_id, index.rank), index.plan
    if index.transforms:
        missing = ", ".join(index.transforms)
        raise UnsupportedFormat(f"{name}: its data was transformed by {missing}, which is not available", path=name)
    if not len(plan.names) == len(plan.dtypes) == len(plan.shapes):
        _corrupt(name, "names, dtypes and shapes differ in number")
    if len(set(plan.names)) != len(plan.names):
        _corrupt(name, "a tensor is listed twice")
    for tensor, dtype, shape in zip(plan.names, plan.dtypes, plan.shapes, strict=True):
        if dtype not in DTYPE_SIZES:
            raise UnsupportedFormat(
                f"{name}: {tensor} has the unknown dtype {dtype[:40]!r}", path=name, tensors=[tensor]
            )
        if any(size < 0 for size in shape) or prod(shape) * DTYPE_SIZES[dtype] >= _LIMIT:
            _corrupt(name, f"{tensor} has the impossible shape {list(shape)[:8]}", tensor)
    known = set(plan.names)
    for alias, target in plan.aliases.items():
        if target not in known or alias in known:
            _corrupt(name, f"the alias {alias} of {target} is not one", alias)
    _check_tables(index, name)
    chunks = list(_chunks(index, name))
    _check_tiling(index, chunks, name)
    return chunks


def _chunks(index: Index, name: str) -> Iterator[_Chunk]:
    plan, columns = index.plan, index.plan.written
    if not len(columns.tensor) == len(columns.file) == len(columns.begin):
        _corrupt(name, "the columns of chunks differ in length")
    ndims = [len(shape) for shape in plan.shapes]
    if any(not 0 <= tensor < len(ndims) for tensor in columns.tensor):
        _corrupt(name, "a chunk is of a tensor that is not listed")
    total = sum(ndims[tensor] for tensor in columns.tensor)
    if not len(columns.offsets) == len(columns.sizes) == total:
        _corrupt(name, "the chunks' offsets and sizes do not fit their tensors' dimensions")
    position = 0
    for tensor, file, begin in zip(columns.tensor, columns.file, columns.begin, strict=True):
        end = position + ndims[tensor]
        box = Box(tuple(columns.offsets[position:end]), tuple(columns.sizes[position:end]))
        position = end
        shape, itemsize = plan.shapes[tensor], DTYPE_SIZES[plan.dtypes[tensor]]
        if box.sizes != shape or any(box.offsets):
            for offset, size, bound in zip(box.offsets, box.sizes, shape, strict=True):
                if offset < 0 or size < 0 or offset + size > bound:
                    _corrupt(
                        name, f"a chunk of {plan.names[tensor]} leaves its shape {list(shape)}", plan.names[tensor]
                    )
        if not 0 <= file < len(index.files):
            _corrupt(name, f"a chunk of {plan.names[tensor]} is in a file that is not listed", plan.names[tensor])
        if begin % itemsize:
            _corrupt(name, f"a chunk of {plan.names[tensor]} begins within an element", plan.names[tensor])
        yield _Chunk(tensor, box, file, begin, prod(box.sizes) * itemsize)


def _check_tables(index: Index, name: str) -> None:
    if not _BLOCK_LIMITS[0] <= index.block_bytes <= _BLOCK_LIMITS[1] or index.block_bytes % 4096:
        _corrupt(name, f"blocks of {index.block_bytes} bytes are out of range")
    if len(index.files) != len(index.plan.images):
        _corrupt(name, "files and images differ in number")
    for number, (file, image) in enumerate(zip(index.files, index.plan.images, strict=True)):
        if file.name != data_name(index.save_id, index.rank, number):
            _corrupt(name, f"its data file number {number} cannot be named {file.name[:80]!r}")
        if not 8 < image.data_start <= image.size < _LIMIT:
            _corrupt(name, f"{file.name} has an impossible size or header")
        if file.lengths is not None or file.stored_size != image.size:
            _corrupt(name, f"{file.name} is stored in {file.stored_size} bytes, and its image has {image.size}")
        if len(file.checksums) != 8 * block_count(image.size, index.block_bytes):
            _corrupt(name, f"the checksums of {file.name} are not as many as its blocks")


def _check_tiling(index: Index, chunks: list[_Chunk], name: str) -> None:
    """In every file the chunks must follow each other from the end of the header to the end of the file."""
    ends = [image.data_start for image in index.plan.images]
    for chunk in sorted(chunks, key=lambda chunk: (chunk.file, chunk.begin, chunk.length)):
        if chunk.begin != ends[chunk.file]:
            fault = "overlapping chunks" if chunk.begin < ends[chunk.file] else "a hole before a chunk"
            tensor = index.plan.names[chunk.tensor]
            _corrupt(name, f"{fault}: {tensor} in {index.files[chunk.file].name}", tensor)
        ends[chunk.file] += chunk.length
    for file, image, end in zip(index.files, index.plan.images, ends, strict=True):
        if end != image.size:
            _corrupt(name, f"the chunks of {file.name} end at byte {end} of {image.size}")


def _file_maps(index: Index, chunks: list[_Chunk]) -> Iterator[FileMap]:
    inside: list[list[_Chunk]] = [[] for _ in index.files]
    for chunk in chunks:
        if chunk.length:
            inside[chunk.file].append(chunk)
    for file, image, members in zip(index.files, index.plan.images, inside, strict=True):
        members.sort(key=lambda chunk: chunk.begin)
        yield FileMap(
            file.name,
            image.size,
            index.block_bytes,
            unpack_checksums(file.checksums),
            [chunk.begin for chunk in members],
            [index.plan.names[chunk.tensor] for chunk in members],
        )


def _corrupt(name: str, what: str, tensor: str | None = None) -> NoReturn:
    raise CorruptCheckpoint(f"{name}: {what}", path=name, tensors=[tensor] if tensor else [])
