"""The frames of the Zstandard format (RFC 8878), as far as they are needed without the library: to find where each
ends and how much it holds before a byte is decompressed, and to write one that stores its content as it is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import xxhash
import zstandard

_MAGIC = b"\x28\xb5\x2f\xfd"
_RAW_LIMIT = 128 << 10
"""The most that a block within a frame may hold."""


class Frame(NamedTuple):
    """A frame's bytes ``begin <= i < end``, which hold ``content`` bytes when decompressed."""

    begin: int
    end: int
    content: int


def frames(data: memoryview, limit: int) -> Iterator[Frame]:
    """The frames that ``data`` consists of, of ``limit`` bytes of content in all. ValueError where it does not, or a
    frame does not say how much it holds, or is cut short.
    """
    position = 0
    while position < len(data):
        rest = data[position:]
        if rest[:4] != _MAGIC:
            raise ValueError("it is not made of frames of Zstandard")
        try:
            content = zstandard.frame_content_size(rest)
            header = zstandard.frame_header_size(rest)
            checked = zstandard.get_frame_parameters(rest).has_checksum
        except zstandard.ZstdError as error:
            raise ValueError(f"a frame's header is damaged ({error})") from error
        if not 0 <= content <= limit:
            raise ValueError(f"a frame of {'unknown size' if content < 0 else f'{content} bytes'}, of at most {limit}")
        limit -= content
        end = position + _length(rest, header) + (4 if checked else 0)
        if end > len(data):
            raise ValueError("a frame is cut short")
        yield Frame(position, end, content)
        position = end


def _length(frame: memoryview, position: int) -> int:
    """The length of a frame without its checksum, by the headers of its blocks."""
    last = False
    while not last:
        if position + 3 > len(frame):
            raise ValueError("a frame is cut short")
        header = int.from_bytes(frame[position : position + 3], "little")
        last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        position += 3 + (1 if kind == 1 else size)  # a run of one byte has only that byte
    return position


def stored_frame(data: memoryview) -> list[bytes | memoryview]:
    """The parts of a frame that holds ``data`` as it is, with a checksum."""
    parts: list[bytes | memoryview] = [_MAGIC, struct.pack("<BI", 0b10100100, len(data))]
    for begin in range(0, len(data) or 1, _RAW_LIMIT):
        block = data[begin : begin + _RAW_LIMIT]
        last = begin + _RAW_LIMIT >= len(data)
        parts += [(len(block) << 3 | last).to_bytes(3, "little"), block]
    return [*parts, (xxhash.xxh64_intdigest(data) & 0xFFFFFFFF).to_bytes(4, "little")]
