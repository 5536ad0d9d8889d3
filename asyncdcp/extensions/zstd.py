"""ZStandard: each block as frames of the Zstandard format (RFC 8878), with content checksums.

Frames that follow each other are one stream to every reader of the format, so ``zstd -d file.safetensors.zst`` gives
the safetensors file. Whatever a sample says does not compress is stored in a frame of its own, at the speed of memory:
such frames are written here, and where each frame ends, and how much it holds, is found here before a byte is
decompressed.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from enum import Enum
from itertools import groupby
from typing import Any, NamedTuple

import xxhash
import zstandard

from asyncdcp.errors import InvalidOption
from asyncdcp.extensions.base import BlockContext, BlockExtension

_MAGIC = b"\x28\xb5\x2f\xfd"
_RAW_LIMIT = 128 << 10
"""The most that a block within a frame may hold."""
_SEGMENT = 256 << 10
"""What one sample decides about."""
_PIECE = 1 << 10
_PIECES = 4
_WORTHWHILE = 0.97
"""A sample has to shrink to this part at most. It is short, so its tables weigh more than in the whole."""
_WINDOW_LOG = 27


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


class _Way(Enum):
    """How a segment is stored."""

    STORED = "as it is"
    ENTROPY = "by the frequency of its bytes"
    MATCHES = "by what repeats, too"


class ZStandard(BlockExtension):
    """Compression with Zstandard at ``level`` (1 to 22, or below 0 for still faster ones).

    The descriptor is that of DCP's, which has no parameters: any level reads what any other wrote.

    >>> with asyncdcp.SyncCheckpointer(process=False, extensions=[asyncdcp.ZStandard()]) as checkpointer:
    ...     result = checkpointer.save("small", {"zeros": torch.zeros(1 << 20)})
    ...     print(result.stored_bytes < 0.01 * result.tensor_bytes, checkpointer.load("small")["zeros"].any())
    True tensor(False)
    """

    role = "compression"

    def __init__(self, level: int = 1) -> None:
        if (
            isinstance(level, bool)
            or not isinstance(level, int)
            or not -100 <= level <= zstandard.MAX_COMPRESSION_LEVEL
        ):
            raise InvalidOption(f"level takes -100 to {zstandard.MAX_COMPRESSION_LEVEL}, not {level!r}")
        self._level = level
        self._local = threading.local()

    @staticmethod
    def registry_name() -> str:
        return "stream.zstd"

    @staticmethod
    def from_descriptor(version: str) -> ZStandard:
        if version.partition(".")[0] != "1":
            raise ValueError(f"version {version[:20]!r} of {ZStandard.registry_name()} is not known")
        return ZStandard()

    def get_descriptor(self) -> str:
        return f"{self.registry_name()}/1"

    def travel(self) -> dict[str, Any]:
        return {"level": self._level}

    def encode(self, data: memoryview, context: BlockContext) -> bytes:
        tools = self._tools()
        parts: list[bytes | memoryview] = []
        for way, run in _runs(data, tools):
            parts += stored_frame(run) if way is _Way.STORED else [tools.compressors[way].compress(run)]
        return parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else b"".join(parts)

    def decode(self, data: memoryview, context: BlockContext) -> bytes:
        tools = self._tools()
        parts = [
            _decompressed(tools, data[frame.begin : frame.end], frame.content)
            for frame in [*frames(data, context.limit)]
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _tools(self) -> _Tools:
        """The thread's own: the library's objects are not to be used by two at once."""
        tools: _Tools | None = getattr(self._local, "tools", None)
        if tools is None:
            tools = self._local.tools = _Tools(self._level)
        return tools


class _Tools:
    """What one thread compresses and decompresses with."""

    def __init__(self, level: int) -> None:
        self.compressors = {
            _Way.MATCHES: zstandard.ZstdCompressor(level=level, write_checksum=True),
            _Way.ENTROPY: zstandard.ZstdCompressor(compression_params=_entropy_parameters()),
        }
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG)


def _entropy_parameters() -> zstandard.ZstdCompressionParameters:
    """Hardly looks for matches: its table has 64 entries. What is left is Huffman coding, which is all that exponents
    of floats can gain from, three times as fast and, with no chance matches in between, denser.
    """
    return zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST,
        window_log=17,
        hash_log=6,
        chain_log=6,
        search_log=1,
        min_match=7,
        target_length=0,
        write_checksum=True,
        write_content_size=True,
    )


def _runs(data: memoryview, tools: _Tools) -> Iterator[tuple[_Way, memoryview]]:
    """The block cut where its kind changes. A rest shorter than a segment goes with the segment before it."""
    begins = range(0, max(len(data) - _SEGMENT, 0) + 1, _SEGMENT)
    ways = [_way(data[begin : begin + _SEGMENT], tools) for begin in begins]
    end = 0
    for way, run in groupby(ways):
        begin, end = end, end + _SEGMENT * len(list(run))
        yield way, data[begin : end if end < begins[-1] + _SEGMENT else len(data)]


def _way(segment: memoryview, tools: _Tools) -> _Way:
    if len(segment) < _SEGMENT:
        return _Way.MATCHES
    step = (_SEGMENT - _PIECE) // (_PIECES - 1)
    sample = b"".join(segment[number * step : number * step + _PIECE] for number in range(_PIECES))
    entropy = len(tools.compressors[_Way.ENTROPY].compress(sample))
    matches = len(tools.compressors[_Way.MATCHES].compress(sample))
    if min(entropy, matches) > _WORTHWHILE * len(sample):
        return _Way.STORED
    return _Way.ENTROPY if entropy <= matches else _Way.MATCHES


def _decompressed(tools: _Tools, frame: memoryview, content: int) -> bytes:
    try:
        return tools.decompressor.decompress(frame, max_output_size=content)
    except zstandard.ZstdError as error:
        raise ValueError(f"a frame is damaged ({error})") from error
