"""Blocks: the unit of checksum, transform and random access within a data file, and the packed table of them."""

from __future__ import annotations

import array
import bisect
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter

import xxhash

BLOCK_BYTES = 1 << 20
SLAB_BYTES = 8 << 20
"""A slab is a run of blocks in flight: one slot of the arena, one I/O. It is never recorded."""


def block_count(size: int, block_bytes: int) -> int:
    """How many blocks a decoded file of ``size`` bytes has; the last may be short."""
    return -(-size // block_bytes)


def stored_limit(block_bytes: int) -> int:
    """The most bytes that a block may be stored in, and may have between two transforms: some make it longer."""
    return min(2 * block_bytes + (64 << 10), SLAB_BYTES + BLOCK_BYTES)


def element_size(runs: Sequence[tuple[int, int]], begin: int, end: int) -> int:
    """The element size in the middle of a block, by ``runs``: (byte of the decoded file, element size from there on).

    Before the first run it is that run's; 1 where there are no runs.
    """
    found = bisect.bisect_right(runs, (begin + end) // 2, key=itemgetter(0))
    return runs[max(found - 1, 0)][1] if runs else 1


def element_runs(begins: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The runs of ``element_size``, from where chunks begin and their element sizes, in order of place. Empty chunks
    must not be among them.
    """
    return [next(run) for _, run in groupby(begins, key=itemgetter(1))]


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
