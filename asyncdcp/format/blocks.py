"""Blocks: the unit of checksum, transform and random access within a data file, and the packed table of them."""

from __future__ import annotations

import array
import sys
from collections.abc import Iterable, Iterator, Sequence

import xxhash

BLOCK_BYTES = 1 << 20
SLAB_BYTES = 8 << 20
"""A slab is a run of blocks in flight: one slot of the arena, one I/O. It is never recorded."""


def block_count(size: int, block_bytes: int) -> int:
    """How many blocks a decoded file of ``size`` bytes has; the last may be short."""
    return -(-size // block_bytes)


def checksum(data: memoryview | bytes) -> int:
    """XXH3-64 of a block's stored bytes. Releases the GIL."""
    return xxhash.xxh3_64_intdigest(data)


def slice_blocks(data: memoryview, block_bytes: int) -> Iterator[memoryview]:
    """The blocks of a slab, in order."""
    return (data[start : start + block_bytes] for start in range(0, len(data), block_bytes))


def pack_checksums(checksums: Iterable[int]) -> bytes:
    """Little-endian, 8 bytes each."""
    return _little_endian(array.array("Q", checksums)).tobytes()


def unpack_checksums(packed: bytes) -> Sequence[int]:
    """The inverse of ``pack_checksums``; ValueError unless the length is a multiple of 8."""
    values = array.array("Q")
    values.frombytes(packed)
    return _little_endian(values)


def _little_endian(values: array.array[int]) -> array.array[int]:
    if sys.byteorder == "big":
        values.byteswap()
    return values
