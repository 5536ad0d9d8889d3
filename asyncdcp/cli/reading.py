"""Elements of stored tensors as numpy arrays, without torch: verified, and however they were sharded.

The dtypes that numpy lacks are widened exactly. Bytes are little-endian and row-major. What is no number of a whole
byte or more (packed bits, integers below 8 bits) stays as the bytes that are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from asyncdcp.boxes import Box, intersect, whole
from asyncdcp.metadata import DTYPE_SIZES, MetadataIndex, TensorStorageMetadata
from asyncdcp.pipeline.formats import ReadableCheckpoint
from asyncdcp.pipeline.windows import ReadRange
from asyncdcp.planning.load_plan import in_batches
from asyncdcp.trace import Trace

Array: TypeAlias = NDArray[Any]

_NUMPY = ("complex128", "complex64", "float64", "float32", "float16", "bool")
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
BATCH_BYTES = 16 << 20
"""About so much is read at once where tensors are measured; in double precision it is up to eight times as much."""


class _Small(NamedTuple):
    """An 8-bit float: bits of exponent and fraction, bias, the codes that are no number, those that are infinite."""

    exponent: int
    fraction: int
    bias: int
    nan: frozenset[int]
    infinite: frozenset[int] = frozenset()


_SMALL = {
    "float8_e4m3fn": _Small(4, 3, 7, frozenset({0x7F, 0xFF})),
    "float8_e4m3fnuz": _Small(4, 3, 8, frozenset({0x80})),
    "float8_e5m2": _Small(5, 2, 15, frozenset({0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF}), frozenset({0x7C, 0xFC})),
    "float8_e5m2fnuz": _Small(5, 2, 16, frozenset({0x80})),
}


def stored_dtype(dtype: str) -> str:
    """The numpy dtype of an element as it is stored: of the same size."""
    if dtype in _NUMPY:
        return dtype if dtype == "bool" else np.dtype(dtype).newbyteorder("<").str
    if dtype in _INTEGERS:
        return np.dtype(dtype).newbyteorder("<").str
    return f"<u{DTYPE_SIZES[dtype]}"


def numbers(stored: Array, dtype: str) -> Array:
    """The values of elements that were read as ``stored_dtype(dtype)``."""
    if dtype == "bfloat16":
        widened: Array = (stored.astype("<u4") << 16).view("<f4")
        return widened
    if dtype == "complex32":
        halves: Array = stored[..., None].view("<f2").astype("<f4").view("<c8")[..., 0]
        return halves
    if dtype in _SMALL or dtype == "float8_e8m0fnu":
        return _table(dtype)[stored]
    return stored


def is_widened(dtype: str) -> bool:
    """Whether numpy lacks the dtype, so that ``numbers`` gives another."""
    return dtype in ("bfloat16", "complex32", "float8_e8m0fnu", *_SMALL)


def is_number(dtype: str) -> bool:
    """Whether ``numbers`` gives values, and not the stored bytes."""
    return dtype in _NUMPY or dtype in _INTEGERS or is_widened(dtype)


@cache
def _table(dtype: str) -> Array:
    """The value of each of the 256 codes of an 8-bit float."""
    if dtype == "float8_e8m0fnu":
        powers = [2.0 ** (code - 127) for code in range(255)]
        return np.array([*powers, np.nan], "<f4")
    return np.array([_small(code, _SMALL[dtype]) for code in range(256)], "<f4")


def _small(code: int, kind: _Small) -> float:
    if code in kind.nan:
        return float("nan")
    sign = -1.0 if code & 0x80 else 1.0
    if code in kind.infinite:
        return sign * float("inf")
    fraction = code & ((1 << kind.fraction) - 1)
    exponent = (code & 0x7F) >> kind.fraction
    if exponent == 0:
        return float(sign * fraction * 2.0 ** (1 - kind.bias - kind.fraction))
    return float(sign * (1 + fraction / (1 << kind.fraction)) * 2.0 ** (exponent - kind.bias))


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
