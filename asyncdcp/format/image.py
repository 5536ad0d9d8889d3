"""The file image: every chunk's place in the data files of one rank, fixed before a byte moves.

Chunks are placed by descending element size and otherwise in the order given, so that each begins at a multiple of its
element size without a gap (safetensors allows none), and data begins on a 4,096-byte boundary. A new file begins where
the next chunk would not fit in the limits; a chunk larger than a whole file is the planner's to split beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asyncdcp.format.safetensors import DATA_ALIGNMENT, HEADER_LIMIT, HeaderEntry, encode_header, entry_bound
from asyncdcp.metadata import DTYPE_SIZES

FILE_LIMIT = 64 << 30


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
