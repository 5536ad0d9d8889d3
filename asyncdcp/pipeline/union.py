"""From the indexes of all ranks to one view of the checkpoint, with nothing taken on trust.

``check_index`` holds an Index against its own numbers: every chunk within its tensor, every byte range within its file,
the ranges tiling the file without overlap or hole, tables as long as the file has blocks. ``unite`` holds the indexes
against each other: one shape and dtype per name, every tensor covered exactly. What passes can be read without further
thought.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import NamedTuple, NoReturn

import msgspec

from asyncdcp.boxes import Box, tiles, whole
from asyncdcp.errors import CorruptCheckpoint, UnsupportedFormat
from asyncdcp.format.blocks import SLAB_BYTES, block_count, element_runs, stored_limit, unpack_checksums
from asyncdcp.metadata import (
    DTYPE_SIZES,
    BytesStorageMetadata,
    ChunkColumns,
    ChunkLocation,
    ChunkStorageMetadata,
    FileTable,
    ImageShape,
    Index,
    IndexPlan,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
    WrittenColumns,
)
from asyncdcp.names import data_name, index_name, is_descriptor
from asyncdcp.pipeline.trees import merge_trees, merge_values

_LIMIT = 1 << 62
_MAX_DIMENSIONS = 64
_BLOCK_LIMITS = (4096, SLAB_BYTES)


class FileMap(NamedTuple):
    """A data file, checked: its decoded size, block size and block checksums, and the chunks in it, sorted by begin.

    ``checksums`` are None for a file of another format: its blocks are then only what a read is cut at, and ``check``,
    if there is one, is called on a worker thread with begin and end of all bytes that are read, and with buffers whose
    first bytes they are, one after another; no byte comes twice. What it raises fails the read.
    ``bounds`` say where each block is stored and where the last one ends, and ``elements`` are the element sizes in it
    (``blocks.element_runs``), both only where ``transforms`` were applied.
    """

    name: str
    size: int
    block_bytes: int
    checksums: Sequence[int] | None
    begins: list[int]
    tensors: list[str]
    check: Callable[[int, int, Sequence[memoryview]], None] | None = None
    transforms: tuple[str, ...] = ()
    bounds: Sequence[int] = ()
    elements: Sequence[tuple[int, int]] = ()

    @property
    def stored_size(self) -> int:
        """The bytes of the file itself."""
        return self.bounds[-1] if self.transforms else self.size


@dataclass
class Union:
    """All indexes as one, as one rank sees it. ``tensor_bytes`` counts every tensor once, and what is each rank's own
    for each; files are by name. ``own`` are the names of what is a rank's own.
    """

    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = field(default_factory=dict)
    storage: dict[MetadataIndex, ChunkLocation] = field(default_factory=dict)
    files: dict[str, FileMap] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    tensor_bytes: int = 0
    values: dict[str, msgspec.Raw] = field(default_factory=dict)
    tree: msgspec.Raw = field(default_factory=msgspec.Raw)
    own: frozenset[str] = frozenset()


class _Chunk(NamedTuple):
    tensor: int
    box: Box
    file: int
    begin: int
    length: int


def check_sizes(files: Iterable[FileMap], sizes: dict[str, int]) -> None:
    """Holds the data files of an union against a listing of the storage."""
    for file in files:
        size = sizes.get(file.name)
        if size != file.stored_size:
            raise damaged(file, "is missing" if size is None else f"has {size} bytes")


def damaged(file: FileMap, what: str) -> CorruptCheckpoint:
    """The error of a data file that is not as long as its Index says."""
    message = f"the data file {file.name} {what}, and had {file.stored_size} bytes; it holds {enumerated(file.tensors)}"
    return CorruptCheckpoint(message, path=file.name, tensors=file.tensors)


def enumerated(tensors: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(name[:200] for name in tensors[:5]) + (" …" if len(tensors) > 5 else "") or "only a header"


class _Tensor(NamedTuple):
    """A tensor as the lowest rank that lists it says (in the Index of name ``source``), and all its chunks."""

    source: str
    dtype: str
    shape: tuple[int, ...]
    chunks: dict[Box, ChunkLocation]


def unite(indexes: Sequence[Index], viewer: int | None = 0) -> Union:
    """The union of all ranks' indexes, each checked, in the order of ranks. Of identical duplicates the lowest rank's
    counts. Of what is each rank's own the union has that of rank ``viewer``, or nothing if that is None.
    """
    union = Union(own=frozenset(name for index in indexes for name in index.plan.own))
    tensors: dict[str, _Tensor] = {}
    before: Index | None = None
    for index in indexes:
        alike = before is not None and _lists_alike(before.plan, index.plan)
        chunks = check_index(index, listed=not alike)
        _gather(union, tensors, index, chunks, visible=index.rank == viewer, alike=alike)
        before = index
    for name, tensor in tensors.items():
        _place(union, name, tensor)
    for alias in union.aliases.keys() & union.tensors.keys():
        _corrupt(index_name(indexes[0].save_id, 0), f"{alias} is stored, and is also tied to another", alias)
    _unite_values(union, indexes, viewer)
    return union


def differing_values(indexes: Sequence[Index]) -> dict[str, int]:
    """Names of plain values that are no rank's own, and that a rank has otherwise than a lower one; with that rank."""
    own = frozenset(name for index in indexes for name in index.plan.own)
    first: dict[str, bytes] = {}
    differing: dict[str, int] = {}
    for index in indexes:
        for name, value in index.values.items():
            if name not in own and first.setdefault(name, bytes(value)) != bytes(value):
                differing.setdefault(name, index.rank)
    return differing


def _unite_values(union: Union, indexes: Sequence[Index], viewer: int | None) -> None:
    """Values and tree: those of the viewer first, then what other ranks have besides."""
    ordered = sorted(indexes, key=lambda index: index.rank != viewer)
    hidden = [frozenset[str]() if index.rank == viewer else frozenset(index.plan.own) for index in ordered]
    union.values = merge_values((index.values, gone) for index, gone in zip(ordered, hidden, strict=True))
    union.tree = merge_trees([index.plan.tree for index in ordered], hidden)
    for name in union.values.keys() & union.tensors.keys():
        _corrupt(index_name(indexes[0].save_id, 0), f"{name} is stored both as a tensor and as a value", name)
    union.tensors.update({name: BytesStorageMetadata(len(value)) for name, value in union.values.items()})


def _lists_alike(before: IndexPlan, plan: IndexPlan) -> bool:
    """Whether an Index lists just what the one before it does, as most do: then that is looked at once."""
    return (
        not (before.own or plan.own)
        and before.names == plan.names
        and before.dtypes == plan.dtypes
        and before.shapes == plan.shapes
    )


def _gather(
    union: Union, tensors: dict[str, _Tensor], index: Index, chunks: list[_Chunk], *, visible: bool, alike: bool
) -> None:
    """Adds one Index: files and aliases to the union, chunks (but for empty ones) to ``tensors``. What is the rank's
    own, and not ``visible``, is only checked. One that is ``alike`` lists nothing new.
    """
    name, plan = index_name(index.save_id, index.rank), index.plan
    own, hidden = set(plan.own), dict[str, _Tensor]()
    for tensor, dtype, shape in () if alike else zip(plan.names, plan.dtypes, plan.shapes, strict=True):
        if tensor in union.own and tensor not in own:
            _corrupt(name, f"{tensor} is one rank's own, and this one shares it", tensor)
        known = hidden if tensor in own and not visible else tensors
        first = known.setdefault(tensor, _Tensor(name, dtype, shape, {}))
        if (first.dtype, first.shape) != (dtype, shape):
            _corrupt(name, f"{tensor} is {dtype}{list(shape)}, and another in {first.source}", tensor)
    for chunk in chunks:
        if chunk.length:
            location = ChunkLocation(index.files[chunk.file].name, chunk.begin, chunk.length)
            tensor = plan.names[chunk.tensor]
            (hidden if tensor in hidden else tensors)[tensor].chunks.setdefault(chunk.box, location)
    for tensor, content in hidden.items():
        union.tensor_bytes += _check_cover(tensor, content)
    for alias, target in plan.aliases.items():
        if alias in own and not visible:
            continue
        if union.aliases.setdefault(alias, target) != target:
            _corrupt(name, f"{alias} is tied to {target}, and to {union.aliases[alias]} on a lower rank", alias)
    union.files.update({file.name: file for file in _file_maps(index, chunks)})


def _place(union: Union, name: str, tensor: _Tensor) -> None:
    """Adds one tensor to the union, once its chunks are seen to cover it without overlapping."""
    union.tensor_bytes += _check_cover(name, tensor)
    for box, location in tensor.chunks.items():
        union.storage[MetadataIndex(name, box.offsets)] = location
    stored = tuple(ChunkStorageMetadata(box.offsets, box.sizes) for box in tensor.chunks)
    union.tensors[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, stored)


def _check_cover(name: str, tensor: _Tensor) -> int:
    """The tensor's bytes, if its chunks cover it without overlapping."""
    target = whole(tensor.shape)
    if list(tensor.chunks) != [target] and not tiles(target, tensor.chunks):
        held = sum(box.volume for box in tensor.chunks)
        fault = "leave a hole in it" if held < target.volume else "overlap"
        _corrupt(tensor.source, f"{name}: its chunks {fault} (shape {list(tensor.shape)})", name)
    return target.volume * DTYPE_SIZES[tensor.dtype]


def check_index(index: Index, *, listed: bool = True) -> list[_Chunk]:
    """The chunks of an Index, all its numbers checked against each other; ``CorruptCheckpoint`` otherwise.

    ``listed=False`` leaves out the list of tensors, which is known to be sound.
    """
    name, plan = index_name(index.save_id, index.rank), index.plan
    for transform in index.transforms:
        if not is_descriptor(transform):
            raise UnsupportedFormat(
                f"{name}: its data was transformed by {transform[:80]!r}, which is no extension", path=name
            )
    if listed:
        _check_list(plan, name)
    _check_aliases(index, name)
    _check_tables(index, name)
    if plan.held is not None:
        for _ in _boxes(plan, plan.held, name):  # what is written covers all of every tensor, so what is held, too
            pass
    chunks = list(_chunks(index, name))
    _check_tiling(index, chunks, name)
    return chunks


def _check_list(plan: IndexPlan, name: str) -> None:
    if not len(plan.names) == len(plan.dtypes) == len(plan.shapes):
        _corrupt(name, "names, dtypes and shapes differ in number")
    if len(set(plan.names)) != len(plan.names):
        _corrupt(name, "a tensor is listed twice")
    for tensor, dtype, shape in zip(plan.names, plan.dtypes, plan.shapes, strict=True):
        if dtype not in DTYPE_SIZES:
            raise UnsupportedFormat(
                f"{name}: {tensor} has the unknown dtype {dtype[:40]!r}", path=name, tensors=[tensor]
            )
        extent = prod(max(size, 1) for size in shape[:_MAX_DIMENSIONS])  # strides must not overflow in an empty one
        if len(shape) > _MAX_DIMENSIONS or min(shape, default=0) < 0 or extent * DTYPE_SIZES[dtype] >= _LIMIT:
            _corrupt(name, f"{tensor} has the impossible shape {_shown(shape)}", tensor)


def _shown(shape: tuple[int, ...]) -> str:
    return ", ".join(str(size)[:24] for size in shape[:8]) + (" …" if len(shape) > 8 else "")


def _check_aliases(index: Index, name: str) -> None:
    """An alias is of a stored tensor, so there are no chains of them, and no circles."""
    known = set(index.plan.names)
    for alias, target in index.plan.aliases.items():
        if target not in known or alias in known or alias in index.values:
            _corrupt(name, f"the alias {alias} of {target} is not one", alias)


def _boxes(plan: IndexPlan, columns: ChunkColumns | WrittenColumns, name: str) -> Iterator[tuple[int, Box]]:
    """The tensor's number and the box of each row, which lies in the tensor's shape."""
    ndims = [len(shape) for shape in plan.shapes]
    if any(not 0 <= tensor < len(ndims) for tensor in columns.tensor):
        _corrupt(name, "a chunk is of a tensor that is not listed")
    total = sum(ndims[tensor] for tensor in columns.tensor)
    if not len(columns.offsets) == len(columns.sizes) == total:
        _corrupt(name, "the chunks' offsets and sizes do not fit their tensors' dimensions")
    position = 0
    for tensor in columns.tensor:
        end = position + ndims[tensor]
        offsets, sizes = tuple(columns.offsets[position:end]), tuple(columns.sizes[position:end])
        position = end
        for start, size, extent in zip(offsets, sizes, plan.shapes[tensor], strict=True):
            if start < 0 or size < 0 or start + size > extent:
                _corrupt(name, f"a chunk of {plan.names[tensor]} leaves its shape", plan.names[tensor])
        yield tensor, Box(offsets, sizes)


def _chunks(index: Index, name: str) -> Iterator[_Chunk]:
    plan, columns = index.plan, index.plan.written
    if not len(columns.tensor) == len(columns.file) == len(columns.begin):
        _corrupt(name, "the columns of chunks differ in length")
    for (tensor, box), file, begin in zip(_boxes(plan, columns, name), columns.file, columns.begin, strict=True):
        itemsize = DTYPE_SIZES[plan.dtypes[tensor]]
        if not 0 <= file < len(index.files):
            _corrupt(name, f"a chunk of {plan.names[tensor]} is in a file that is not listed", plan.names[tensor])
        if begin % itemsize:
            _corrupt(name, f"a chunk of {plan.names[tensor]} begins within an element", plan.names[tensor])
        yield _Chunk(tensor, box, file, begin, box.volume * itemsize)


def _check_tables(index: Index, name: str) -> None:
    if not _BLOCK_LIMITS[0] <= index.block_bytes <= _BLOCK_LIMITS[1] or index.block_bytes % 4096:
        _corrupt(name, f"blocks of {index.block_bytes} bytes are out of range")
    if len(index.files) != len(index.plan.images):
        _corrupt(name, "files and images differ in number")
    for number, (file, image) in enumerate(zip(index.files, index.plan.images, strict=True)):
        if file.name != data_name(index.save_id, index.rank, number, index.transforms):
            _corrupt(name, f"its data file number {number} cannot be named {file.name[:80]!r}")
        if not 8 < image.data_start <= image.size < _LIMIT:
            _corrupt(name, f"{file.name} has an impossible size or header")
        _check_lengths(index, file, image, name)
        if len(file.checksums) != 8 * block_count(image.size, index.block_bytes):
            _corrupt(name, f"the checksums of {file.name} are not as many as its blocks")


def _check_lengths(index: Index, file: FileTable, image: ImageShape, name: str) -> None:
    """Without transforms blocks are as long as in the image; with them each has a length of its own, within bounds."""
    if (file.lengths is not None) != bool(index.transforms):
        _corrupt(name, f"{file.name} has lengths of blocks without transforms, or none with them")
    stored = image.size
    if file.lengths is not None:
        if len(file.lengths) != block_count(image.size, index.block_bytes):
            _corrupt(name, f"the lengths of {file.name} are not as many as its blocks")
        limit = stored_limit(index.block_bytes)
        if min(file.lengths) < 1 or max(file.lengths) > limit:
            _corrupt(name, f"a block of {file.name} has an impossible length; it takes 1 to {limit} bytes")
        stored = sum(file.lengths)
    if file.stored_size != stored:
        _corrupt(name, f"{file.name} is stored in {file.stored_size} bytes, and its blocks have {stored}")


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
        found = FileMap(
            file.name,
            image.size,
            index.block_bytes,
            unpack_checksums(file.checksums),
            [chunk.begin for chunk in members],
            [index.plan.names[chunk.tensor] for chunk in members],
        )
        if file.lengths is not None:
            sizes = (DTYPE_SIZES[index.plan.dtypes[chunk.tensor]] for chunk in members)
            found = found._replace(
                transforms=tuple(index.transforms),
                bounds=list(accumulate(file.lengths, initial=0)),
                elements=element_runs(zip(found.begins, sizes, strict=True)),
            )
        yield found


def _corrupt(name: str, what: str, tensor: str | None = None) -> NoReturn:
    raise CorruptCheckpoint(f"{name}: {what}", path=name, tensors=[tensor] if tensor else [])
