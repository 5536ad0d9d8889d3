"""What a reader sees of a ``ChunkTable``: mappings by name that make their entries when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from asyncdcp.boxes import Box, whole
from asyncdcp.chunk_table import ChunkTable
from asyncdcp.metadata import (
    BytesStorageMetadata,
    ChunkLocation,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)


class StoredTensors(Mapping[str, TensorStorageMetadata | BytesStorageMetadata]):
    """A table's tensors by name, with ``values``, each made when it is first asked for."""

    def __init__(self, table: ChunkTable, values: Mapping[str, BytesStorageMetadata]) -> None:
        self._table = table
        self._numbers = {tensor.name: n for n, tensor in enumerate(table.tensors) if tensor.shown}
        self._values = values
        self._made: dict[str, TensorStorageMetadata] = {}
        self._properties: dict[str, TensorProperties] = {}

    def __getitem__(self, name: str) -> TensorStorageMetadata | BytesStorageMetadata:
        if name in self._made:
            return self._made[name]
        if name not in self._numbers:
            return self._values[name]
        number = self._numbers[name]
        tensor = self._table.tensors[number]
        properties = self._properties.setdefault(tensor.dtype, TensorProperties(tensor.dtype))
        chunks = _sole(tensor.shape) if self._table.count(number) == 1 else _Chunks(self._table, number)
        made = TensorStorageMetadata(properties, tensor.shape, chunks)
        return self._made.setdefault(name, made)

    def __iter__(self) -> Iterator[str]:
        yield from self._numbers
        yield from self._values

    def __len__(self) -> int:
        return len(self._numbers) + len(self._values)


@lru_cache(1024)
def _sole(shape: tuple[int, ...]) -> tuple[ChunkStorageMetadata, ...]:
    """The chunks of a tensor that is one."""
    return (ChunkStorageMetadata(*whole(shape)),)


class _Chunks(Sequence[ChunkStorageMetadata]):
    """The chunks of a tensor; equal to any sequence of the same."""

    def __init__(self, table: ChunkTable, number: int) -> None:
        self._table, self._number = table, number

    @cached_property
    def _all(self) -> tuple[ChunkStorageMetadata, ...]:
        return tuple(ChunkStorageMetadata(*box) for box in self._table.boxes(self._number))

    def __getitem__(self, at: Any) -> Any:
        return self._all[at]

    def __len__(self) -> int:
        return self._table.count(self._number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._all == tuple(other)

    def __hash__(self) -> int:
        return hash(self._all)

    def __repr__(self) -> str:
        return repr(self._all)


class StoredChunks(Mapping[MetadataIndex, ChunkLocation]):
    """Where each chunk of a table is. ``meeting`` finds those that share a point with a box."""

    def __init__(self, table: ChunkTable) -> None:
        self._table = table
        self._numbers = {tensor.name: n for n, tensor in enumerate(table.tensors) if tensor.shown}
        self._found: dict[str, dict[tuple[int, ...], int]] = {}

    def meeting(self, name: str, box: Box) -> Iterator[tuple[Box, ChunkLocation]]:
        """The chunks of a tensor that share a point with ``box``, and where they are."""
        return self._table.meeting(self._numbers[name], box)

    def __getitem__(self, index: MetadataIndex) -> ChunkLocation:
        name, offsets = index
        if name not in self._found:
            self._found[name] = {box.offsets: n for n, box in enumerate(self._table.boxes(self._numbers[name]))}
        return self._table.location(self._numbers[name], self._found[name][offsets])

    def __iter__(self) -> Iterator[MetadataIndex]:
        for name, number in self._numbers.items():
            for box in self._table.boxes(number):
                yield MetadataIndex(name, box.offsets)

    def __len__(self) -> int:
        return sum(map(self._table.count, self._numbers.values()))
