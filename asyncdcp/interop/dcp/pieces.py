"""What is made of pieces that are read in any order and on several threads: the CRC32 of their records, and whole
elements of what was cut, since DCP's archives begin anywhere in a file, and reads are cut at its borders.
"""

from __future__ import annotations

import bisect
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from threading import Lock
from typing import Final, NamedTuple

from asyncdcp.errors import CorruptCheckpoint
from asyncdcp.pipeline.windows import Deliver

_POLYNOMIAL: Final = 0xEDB88320
_ONE: Final = 1 << 31


class Record(NamedTuple):
    """Bytes ``begin <= i < begin + size`` of a file, their CRC32, and the tensor that they are."""

    begin: int
    size: int
    crc: int
    name: str


class RecordCheck:
    """Checks those of ``records``, all of one file, that are seen whole; what is read in part cannot be checked."""

    def __init__(self, path: str, records: Iterable[Record]) -> None:
        self._path = path
        self._records = sorted(records)
        self._begins = [record.begin for record in self._records]
        self._seen: dict[int, list[tuple[int, int, int]]] = {record.begin: [] for record in self._records}
        self._lock = Lock()

    def __call__(self, begin: int, end: int, pieces: Sequence[memoryview]) -> None:
        """Takes note of bytes ``begin <= i < end`` of the file, which lie in ``pieces``; each byte comes once.

        Raises ``CorruptCheckpoint`` with the last byte of a record that does not match.
        """
        first = max(bisect.bisect_right(self._begins, begin) - 1, 0)
        for record in self._records[first : bisect.bisect_left(self._begins, end)]:
            start, stop = max(begin, record.begin), min(end, record.begin + record.size)
            if start < stop:
                crc = 0
                for data in _between(pieces, start - begin, stop - begin):
                    crc = zlib.crc32(data, crc)
                self._add(record, (start, stop - start, crc))

    def _add(self, record: Record, part: tuple[int, int, int]) -> None:
        with self._lock:
            seen = self._seen[record.begin]
            seen.append(part)
            whole = sum(size for _, size, _ in seen) == record.size
        if whole and joined(sorted(seen)) != record.crc:
            raise CorruptCheckpoint(
                f"{self._path}: the record of {record.name} at byte {record.begin} does not match its CRC32. Tensors "
                "loaded in place may be partly written",
                path=self._path,
                tensors=[record.name],
            )


def joined(parts: Iterable[tuple[int, int, int]]) -> int:
    """The CRC32 of parts that follow each other: their begins, which do not matter, sizes and CRCs."""
    total = 0
    for _, size, crc in parts:
        total = _times(_shift(size), total) ^ crc
    return total


def _between(pieces: Sequence[memoryview], begin: int, end: int) -> Iterator[memoryview]:
    """The bytes ``begin <= i < end`` of the pieces, which follow each other."""
    for piece in pieces:
        if begin < len(piece) and end > 0:
            yield piece[max(begin, 0) : end]
        begin -= len(piece)
        end -= len(piece)


# A CRC is a polynomial over GF(2), its highest power in the lowest bit. That of A followed by n bytes B is
# crc(A) * x ** (8 * n) + crc(B), modulo the CRC's own polynomial (zlib's crc32_combine does the same).


def _times(a: int, b: int) -> int:
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def _shift(size: int) -> int:
    """x ** (8 * size)."""
    power, factor = _ONE, _times(_ONE >> 4, _ONE >> 4)  # x ** 8
    while size:
        if size & 1:
            power = _times(factor, power)
        factor = _times(factor, factor)
        size >>= 1
    return power


class WholeElements:
    """A ``deliver`` for pieces of a range that are cut anywhere: passes on whole elements of ``itemsize`` bytes only.

    The range begins and ends with an element. Pieces may come in any order, on several threads; no more is held than
    the elements that were cut.
    """

    def __init__(self, deliver: Deliver, itemsize: int) -> None:
        self._deliver = deliver
        self._itemsize = itemsize
        self._cut: dict[int, tuple[bytearray, list[int]]] = {}
        self._lock = threading.Lock()

    def __call__(self, offset: int, data: memoryview) -> None:
        end, size = offset + len(data), self._itemsize
        first, last = -(-offset // size) * size, end // size * size
        if first < last:
            self._deliver(first, data[first - offset : last - offset])
        if offset < first:
            self._hold(offset, data[: min(first, end) - offset])
        if first <= last < end:
            self._hold(last, data[last - offset :])

    def _hold(self, offset: int, data: memoryview) -> None:
        """Bytes of one element."""
        begin = offset // self._itemsize * self._itemsize
        with self._lock:
            element, lengths = self._cut.setdefault(begin, (bytearray(self._itemsize), []))
            element[offset - begin : offset - begin + len(data)] = data
            lengths.append(len(data))
            whole = sum(lengths) == self._itemsize
            if whole:
                del self._cut[begin]
        if whole:
            self._deliver(begin, memoryview(element))
