"""CRCs of parts add up to that of the whole."""

from __future__ import annotations

import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdcp.errors import CorruptCheckpoint
from asyncdcp.interop.dcp.pieces import Record, RecordCheck, joined


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_joined(parts: list[bytes]) -> None:
    assert joined([(0, len(part), zlib.crc32(part)) for part in parts]) == zlib.crc32(b"".join(parts))


@pytest.mark.parametrize("damaged", [None, 1500, 5000])
def test_records_seen_in_any_order(damaged: int | None) -> None:
    data = bytearray(random.Random(1).randbytes(10_000))
    records = [Record(100, 2000, zlib.crc32(data[100:2100]), "a"), Record(2100, 5000, zlib.crc32(data[2100:7100]), "b")]
    check = RecordCheck("file", records)
    if damaged is not None:
        data[damaged] ^= 8
    view = memoryview(data)
    windows = [(4000, 8000), (0, 1000), (1000, 4000)]

    def read() -> None:
        for begin, end in windows:
            middle = (begin + end) // 2
            check(begin, end, [view[begin:middle], view[middle : end + 500]])

    if damaged is None:
        read()
    else:
        with pytest.raises(CorruptCheckpoint, match=f"record of {'a' if damaged < 2100 else 'b'} at byte"):
            read()


def test_a_record_seen_in_part_says_nothing() -> None:
    RecordCheck("file", [Record(0, 100, 1, "a")])(0, 99, [memoryview(bytes(99))])
