"""The file image: every chunk's place in the data files of one rank, fixed before a byte moves; and the safetensors
header that each begins with (https://github.com/huggingface/safetensors#format): 8 bytes of length, then JSON, then
data.

Chunks are placed by descending element size and otherwise in the order given, so that each begins at a multiple of its
element size without a gap (safetensors allows none). A new file begins where the next chunk would not fit in the
limits; a chunk larger than a whole file is the planner's to split beforehand. The header is padded with spaces, as the
format allows, so that data begins at a multiple of 4,096 bytes and can be staged, written and read with direct I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from asyncdcp.boxes import Box, whole
from asyncdcp.metadata import DTYPE_SIZES

DATA_ALIGNMENT = 4096
HEADER_LIMIT = 100_000_000
"""What safetensors' own reader accepts."""

SAFETENSORS_DTYPES: dict[str, str] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}
"""The dtypes that every released safetensors reader knows; all others are stored as bytes (U8), and the Index says what
they are. A dtype a reader does not know would make the whole file unreadable to it."""
FILE_LIMIT = 64 << 30


class HeaderEntry(NamedTuple):
    """A chunk in the order of the file: the tensor's FQN, dtype and shape, and the chunk's box in it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box

    @property
    def nbytes(self) -> int:
        """Of the chunk's elements, packed."""
        return self.box.volume * DTYPE_SIZES[self.dtype]


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def chunk_name(entry: HeaderEntry) -> str:
    """The name in the header: the FQN for a whole tensor, with the box of a shard behind it: ``w[0:4,8:16]``."""
    if entry.box == whole(entry.shape):
        return entry.name
    ranges = (f"{start}:{start + size}" for start, size in zip(entry.box.offsets, entry.box.sizes, strict=True))
    return f"{entry.name}[{','.join(ranges)}]"


def encode_header(entries: Sequence[HeaderEntry], metadata: dict[str, str]) -> bytes:
    """The first bytes of the file, up to where data begins, for chunks that follow each other in this order.

    ``metadata`` goes under ``__metadata__``. A name that is taken (or is ``__metadata__``) gets ``#2``, ``#3`` …
    appended: the header must be valid whatever the FQNs are, and the Index is the authority.
    """
    fields: dict[str, object] = {"__metadata__": metadata}
    begin = 0
    for entry in entries:
        length = entry.nbytes
        dtype = SAFETENSORS_DTYPES.get(entry.dtype)
        shape = entry.box.sizes if dtype else (length,)
        fields[_unused(chunk_name(entry), fields)] = _Entry(dtype or "U8", shape, (begin, begin + length))
        begin += length
    text = msgspec.json.encode(fields)
    padded = -(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8
    return struct.pack("<Q", padded) + text.ljust(padded)


def entry_bound(entry: HeaderEntry) -> int:
    """At least the bytes that an entry takes in the header: JSON may need six for a character, and a number has at most
    20 digits.
    """
    return 128 + 6 * len(entry.name) + 64 * len(entry.shape)


def _unused(name: str, taken: dict[str, object]) -> str:
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}#{number}"
    return candidate


@dataclass(frozen=True)
class FileImage:
    """One data file before transforms: the encoded header, then ``chunks`` (numbers into the caller's sequence) at
    ``begins``.

    ``size`` counts all bytes of the file, and ``begins`` count from the file's first byte.
    """

    header: bytes
    chunks: tuple[int, ...]
    begins: tuple[int, ...]
    size: int


def lay_out(
    entries: Sequence[HeaderEntry],
    metadata: dict[str, str],
    *,
    file_limit: int = FILE_LIMIT,
    header_limit: int = HEADER_LIMIT,
) -> list[FileImage]:
    """Places all chunks; deterministic. ``file_limit`` bounds the bytes of data in a file, ``header_limit`` those of
    its header.
    """
    order = sorted(range(len(entries)), key=lambda n: -DTYPE_SIZES[entries[n].dtype])
    images: list[FileImage] = []
    current: list[int] = []
    filled = described = 0
    for n in order:
        length, text = entries[n].nbytes, entry_bound(entries[n])
        if current and (filled + length > file_limit or described + text > header_limit - DATA_ALIGNMENT):
            images.append(_image(entries, current, metadata))
            current, filled, described = [], 0, 0
        current.append(n)
        filled += length
        described += text
    if current:
        images.append(_image(entries, current, metadata))
    return images


def _image(entries: Sequence[HeaderEntry], chosen: list[int], metadata: dict[str, str]) -> FileImage:
    header = encode_header([entries[n] for n in chosen], metadata)
    begins, end = [], len(header)
    for n in chosen:
        begins.append(end)
        end += entries[n].nbytes
    return FileImage(header, tuple(chosen), tuple(begins), end)
