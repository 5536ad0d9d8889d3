"""From the indexes of all ranks to one view of the checkpoint, with nothing taken on trust.

``checking`` holds an Index against its own numbers; ``unite`` holds the indexes against each other: one shape and dtype
per name, every tensor covered exactly. What passes can be read without further thought.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import msgspec

from asyncdcp.chunk_table import ChunkTable, Listing, Rows, StoredTensor
from asyncdcp.errors import CorruptCheckpoint
from asyncdcp.format.blocks import element_runs, unpack_checksums
from asyncdcp.metadata import (
    DTYPE_SIZES,
    BytesStorageMetadata,
    ChunkLocation,
    Index,
    IndexPlan,
    MetadataIndex,
    TensorStorageMetadata,
)
from asyncdcp.names import index_name
from asyncdcp.pipeline.checking import Chunks, check_index, corrupt
from asyncdcp.pipeline.trees import merge_trees, merge_values
from asyncdcp.stored_chunks import StoredChunks, StoredTensors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints: TypeAlias = NDArray[np.int64]


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

    def bound(self, block: int) -> int:
        """Where a block is stored; after the last one, where that ends."""
        return self.bounds[block] if self.transforms else min(block * self.block_bytes, self.size)

    def tensors_in(self, block: int) -> tuple[str, ...]:
        """The tensors of which something lies in a block."""
        first = max(bisect.bisect_right(self.begins, block * self.block_bytes) - 1, 0)
        return tuple(self.tensors[first : bisect.bisect_left(self.begins, (block + 1) * self.block_bytes)])


@dataclass
class Union:
    """All indexes as one, as one rank sees it. ``tensor_bytes`` counts every tensor once, and what is each rank's own
    for each; files are by name. ``own`` are the names of what is a rank's own.
    """

    tensors: Mapping[str, TensorStorageMetadata | BytesStorageMetadata] = field(default_factory=dict)
    storage: Mapping[MetadataIndex, ChunkLocation] = field(default_factory=dict)
    files: dict[str, FileMap] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    tensor_bytes: int = 0
    values: dict[str, msgspec.Raw] = field(default_factory=dict)
    tree: msgspec.Raw = field(default_factory=msgspec.Raw)
    own: frozenset[str] = frozenset()


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
    """The first few names, for a message: each once, of however many chunks."""
    names = list(islice(dict.fromkeys(tensors), 6))
    return ", ".join(name[:200] for name in names[:5]) + (" …" if len(names) > 5 else "") or "only a header"


def unite(indexes: Sequence[Index], viewer: int | None = 0) -> Union:
    """The union of all ranks' indexes, each checked, in the order of ranks. Of identical duplicates the lowest rank's
    counts. Of what is each rank's own the union has that of rank ``viewer``, or nothing if that is None.
    """
    union = Union(own=frozenset(name for index in indexes for name in index.plan.own))
    gathered = _Gathered(union.own)
    for index in indexes:
        gathered.add(index, visible=index.rank == viewer)
        _add_aliases(union, index, visible=index.rank == viewer)
    union.files = gathered.maps
    table = gathered.table()
    fault = table.fault()
    if fault is not None:
        tensor = table.tensors[fault[0]]
        what = f"{tensor.name}: its chunks {fault[1]} (shape {list(tensor.shape)})"
        corrupt(tensor.source, what, tensor.name)
    union.tensor_bytes = sum(tensor.nbytes for tensor in table.tensors)
    _unite_values(union, indexes, viewer)
    _check_names(union, table, index_name(indexes[0].save_id, 0))
    values = {name: BytesStorageMetadata(len(value)) for name, value in union.values.items()}
    union.tensors, union.storage = StoredTensors(table, values), StoredChunks(table)
    return union


def _check_names(union: Union, table: ChunkTable, source: str) -> None:
    """One name means one thing."""
    for name in union.aliases:
        if name in union.values:
            corrupt(source, f"{name} is a value, and is also tied to a tensor", name)
    for tensor in table.tensors:
        if tensor.shown and tensor.name in union.aliases:
            corrupt(source, f"{tensor.name} is stored, and is also tied to another", tensor.name)
        if tensor.shown and tensor.name in union.values:
            corrupt(source, f"{tensor.name} is stored both as a tensor and as a value", tensor.name)


class _Gathered:
    """The tensors and chunks of all indexes, as they come in. ``own`` are the names of what is any rank's own."""

    def __init__(self, own: Collection[str]) -> None:
        self._own = own
        self._numbers: dict[str, int] = {}
        self._tensors: list[StoredTensor] = []
        self._parts: list[tuple[Rows, Ints, Ints]] = []
        self._before: tuple[IndexPlan, Listing, Ints] | None = None
        self.maps: dict[str, FileMap] = {}

    def add(self, index: Index, *, visible: bool) -> None:
        """Checks one Index, and adds it. What is its rank's own, and not ``visible``, is only checked."""
        alike = self._before if self._before is not None and _lists_alike(self._before[0], index.plan) else None
        chunks = check_index(index, listing=alike[1] if alike else None)
        numbers = alike[2] if alike else self._number(index, visible=visible)
        self._before = (index.plan, chunks.listing, numbers)
        filled = chunks.rows.length > 0
        rows = chunks.rows.only(filled, chunks.listing.ndims[chunks.rows.tensor])
        file = chunks.file[filled] + len(self.maps)
        self._parts.append((rows._replace(tensor=numbers[rows.tensor]), file, chunks.begin[filled]))
        self.maps.update({found.name: found for found in _file_maps(index, chunks)})

    def _number(self, index: Index, *, visible: bool) -> Ints:
        """The numbers that the tensors of an Index have among all."""
        import numpy as np

        source, plan, own = index_name(index.save_id, index.rank), index.plan, frozenset(index.plan.own)
        numbers = []
        for tensor, dtype, shape in zip(plan.names, plan.dtypes, plan.shapes, strict=True):
            if tensor in self._own and tensor not in own:
                corrupt(source, f"{tensor} is one rank's own, and this one shares it", tensor)
            hidden = tensor in own and not visible
            number = len(self._tensors) if hidden else self._numbers.setdefault(tensor, len(self._tensors))
            if number == len(self._tensors):
                self._tensors.append(StoredTensor(tensor, source, dtype, shape, not hidden))
            first = self._tensors[number]
            if (first.dtype, first.shape) != (dtype, shape):
                corrupt(source, f"{tensor} is {dtype}{list(shape)}, and another in {first.source}", tensor)
            numbers.append(number)
        return np.array(numbers, np.int64)

    def table(self) -> ChunkTable:
        """All of them."""
        return ChunkTable(self._tensors, list(self.maps), self._parts)


def _add_aliases(union: Union, index: Index, *, visible: bool) -> None:
    own = frozenset(index.plan.own)
    for alias, target in index.plan.aliases.items():
        if alias in own and not visible:
            continue
        if union.aliases.setdefault(alias, target) != target:
            what = f"{alias} is tied to {target}, and to {union.aliases[alias]} on a lower rank"
            corrupt(index_name(index.save_id, index.rank), what, alias)


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


def _lists_alike(before: IndexPlan, plan: IndexPlan) -> bool:
    """Whether an Index lists just what the one before it does, as most do: then that is looked at once."""
    return (
        not (before.own or plan.own)
        and before.names == plan.names
        and before.dtypes == plan.dtypes
        and before.shapes == plan.shapes
    )


def _file_maps(index: Index, chunks: Chunks) -> Iterator[FileMap]:
    for number in range(len(index.files)):
        placed = chunks.placed[chunks.file[chunks.placed] == number] if len(index.files) > 1 else chunks.placed
        tensors, begins = chunks.rows.tensor[placed].tolist(), chunks.begin[placed].tolist()
        found = stored_file(index, number)._replace(begins=begins, tensors=[index.plan.names[n] for n in tensors])
        if found.transforms:
            sizes = (DTYPE_SIZES[index.plan.dtypes[tensor]] for tensor in tensors)
            found = found._replace(elements=element_runs(zip(begins, sizes, strict=True)))
        yield found


def stored_file(index: Index, number: int) -> FileMap:
    """A data file that is sound by ``checking.check_file``, without what lies in it."""
    file, image = index.files[number], index.plan.images[number]
    found = FileMap(file.name, image.size, index.block_bytes, unpack_checksums(file.checksums), [], [])
    if file.lengths is None:
        return found
    return found._replace(transforms=tuple(index.transforms), bounds=list(accumulate(file.lengths, initial=0)))
