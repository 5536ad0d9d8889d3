"""Elements of stored tensors, read into numpy arrays: verified, and however they were sharded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from asyncdcp.boxes import Box, intersect, whole
from asyncdcp.cli.numbers import Array, stored_dtype
from asyncdcp.metadata import MetadataIndex, TensorStorageMetadata
from asyncdcp.pipeline.formats import ReadableCheckpoint
from asyncdcp.pipeline.windows import ReadRange
from asyncdcp.planning.load_plan import in_batches
from asyncdcp.trace import Trace

BATCH_BYTES = 16 << 20
"""About so much is read at once where tensors are measured; in double precision it is up to eight times as much."""


class Piece(NamedTuple):
    """Rows of a tensor: a box that is whole but for its first dimension."""

    name: str
    box: Box


def stored(reader: ReadableCheckpoint, name: str) -> TensorStorageMetadata:
    """What is known of a tensor."""
    tensor = reader.metadata.state_dict_metadata[name]
    assert isinstance(tensor, TensorStorageMetadata)
    return tensor


def pieces(name: str, shape: Sequence[int], itemsize: int) -> Iterator[Piece]:
    """A tensor cut into rows of at most ``BATCH_BYTES``, or one row; at least one piece."""
    if not shape:
        yield Piece(name, whole(shape))
        return
    row = prod(shape[1:]) * itemsize
    step = max(1, BATCH_BYTES // max(row, 1))
    for begin in range(0, max(shape[0], 1), step):
        size = min(step, shape[0] - begin)
        yield Piece(name, Box((begin, *(0,) * (len(shape) - 1)), (size, *shape[1:])))


def batches(parts: Iterator[Piece], itemsizes: dict[str, int]) -> Iterator[list[Piece]]:
    """Runs of pieces of about ``BATCH_BYTES`` together."""
    return in_batches(parts, lambda part: part.box.volume * itemsizes[part.name], BATCH_BYTES)


async def read_pieces(reader: ReadableCheckpoint, parts: Sequence[Piece], trace: Trace) -> list[Array]:
    """The elements of each piece as they are stored (see ``numbers``), in the piece's shape."""
    ranges: list[ReadRange] = []
    placed: list[tuple[np.dtype[Any], list[_Run]]] = []
    for part in parts:
        tensor = stored(reader, part.name)
        dtype = np.dtype(stored_dtype(tensor.properties.dtype))
        runs = [*_runs(reader, part, tensor, dtype)]
        ranges += (ReadRange(run.file, run.begin, run.begin + run.data.nbytes, _bytes(run.data), None) for run in runs)
        placed.append((dtype, runs))
    await reader.read([each for each in ranges if each.end > each.begin], trace)
    return [_assembled(part.box, dtype, runs) for part, (dtype, runs) in zip(parts, placed, strict=True)]


class _Run(NamedTuple):
    """Whole rows of a stored chunk, and the array that they are read to."""

    box: Box
    file: str
    begin: int
    data: Array


def _runs(
    reader: ReadableCheckpoint, part: Piece, tensor: TensorStorageMetadata, dtype: np.dtype[Any]
) -> Iterator[_Run]:
    """The rows of each chunk that meet the piece. In a chunk they follow each other."""
    for chunk in tensor.chunks:
        box = Box(chunk.offsets, chunk.sizes)
        common = intersect(box, part.box)
        if common is None:
            continue
        place = reader.metadata.storage_data[MetadataIndex(part.name, chunk.offsets)]
        if not box.sizes:
            yield _Run(box, place.file, place.begin, np.empty((), dtype))
            continue
        rows = Box((common.offsets[0], *box.offsets[1:]), (common.sizes[0], *box.sizes[1:]))
        skipped = (rows.offsets[0] - box.offsets[0]) * prod(box.sizes[1:]) * dtype.itemsize
        yield _Run(rows, place.file, place.begin + skipped, np.empty(rows.sizes, dtype))


def _assembled(box: Box, dtype: np.dtype[Any], runs: list[_Run]) -> Array:
    if len(runs) == 1 and runs[0].box == box:
        return runs[0].data
    target = np.empty(box.sizes, dtype)
    for run in runs:
        common = intersect(box, run.box)
        assert common is not None
        target[_slices(common, box)] = run.data[_slices(common, run.box)]
    return target


def _slices(inner: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(
        slice(start - origin, start - origin + size)
        for start, size, origin in zip(inner.offsets, inner.sizes, outer.offsets, strict=True)
    )


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
