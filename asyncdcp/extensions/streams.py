"""A StreamTransformExtension as a transform of blocks."""

from __future__ import annotations

import io
from typing import IO, cast

from asyncdcp.extensions.base import StreamTransformExtension


def encode_stream(extension: StreamTransformExtension, data: memoryview) -> bytes:
    """The whole stream that ``data`` becomes."""
    collected = _Collected()
    stream = extension.transform_to(cast("IO[bytes]", collected))
    position = 0
    while position < len(data):
        position += stream.write(data[position:]) or _stuck()
    stream.close()
    return collected.getvalue()


def decode_stream(extension: StreamTransformExtension, data: memoryview, limit: int) -> bytes:
    """What a stream holds; ValueError where that is more than ``limit`` bytes."""
    decoded = bytearray()
    with extension.transform_from(io.BytesIO(data)) as stream:
        while part := stream.read(limit + 1 - len(decoded)):
            decoded += part
            if len(decoded) > limit:
                raise ValueError(f"it holds more than {limit} bytes")
    return bytes(decoded)


class _Collected(io.BytesIO):
    """Can be read after it was closed: a transform may close what it writes to, or only flush it."""

    def close(self) -> None:
        pass


def _stuck() -> int:
    raise ValueError("the stream takes no more bytes")
