from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from asyncdcp.boxes import Box, whole
from asyncdcp.format.blocks import block_count, checksum, pack_checksums, slice_blocks, unpack_checksums
from asyncdcp.format.image import (
    SAFETENSORS_DTYPES,
    FileImage,
    HeaderEntry,
    chunk_name,
    encode_header,
    entry_bound,
    lay_out,
)
from asyncdcp.metadata import DTYPE_SIZES
from tests.pipeline.forge import steady


def entry(name: str, dtype: str, shape: tuple[int, ...], box: Box | None = None) -> HeaderEntry:
    return HeaderEntry(name, dtype, shape, box or whole(shape))


def file_of(image: FileImage) -> bytes:
    """A file whose data counts up."""
    return image.header + bytes(n % 251 for n in range(image.size - len(image.header)))


entries = st.lists(
    st.builds(
        entry,
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | st.sampled_from(["__metadata__", "w", "w#2"]),
        st.sampled_from(sorted(DTYPE_SIZES)),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
    ),
    max_size=8,
)


@steady
@given(entries)
def test_any_file_is_safetensors_to_safetensors(chosen: list[HeaderEntry]) -> None:
    for image in lay_out(chosen, {"format": "pt"}):
        assert len(image.header) % 4096 == 0
        data = file_of(image)
        found = safetensors.deserialize(data)
        assert len(found) == len(image.chunks) == len({name for name, _ in found})
        for n, begin in zip(image.chunks, image.begins, strict=True):
            assert begin % DTYPE_SIZES[chosen[n].dtype] == 0


@steady
@given(entries, st.integers(1, 200))
def test_files_hold_every_chunk_once_back_to_back(chosen: list[HeaderEntry], limit: int) -> None:
    images = lay_out(chosen, {}, file_limit=limit)
    assert sorted(n for image in images for n in image.chunks) == list(range(len(chosen)))
    for image in images:
        sizes = [chosen[n].box.volume * DTYPE_SIZES[chosen[n].dtype] for n in image.chunks]
        ends = [begin + size for begin, size in zip(image.begins, sizes, strict=True)]
        assert [*image.begins, image.size] == [len(image.header), *ends]
        assert len(sizes) == 1 or sum(sizes) <= limit


@steady
@given(entries)
def test_a_header_is_no_longer_than_its_bound(chosen: list[HeaderEntry]) -> None:
    length = struct.unpack("<Q", encode_header(chosen, {"format": "pt"})[:8])[0]
    assert length <= 4096 + sum(map(entry_bound, chosen))


def test_a_header_limit_begins_another_file() -> None:
    many = [entry(f"n{n}" * 20, "int8", (1,)) for n in range(100)]
    images = lay_out(many, {"format": "pt"}, header_limit=20_000)
    assert len(images) > 1 and all(len(image.header) <= 20_000 for image in images)
    assert sum(len(image.chunks) for image in images) == 100


def test_a_lone_file_opens_and_says_what_it_is(tmp_path: Path) -> None:
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    chosen = [
        entry("w", "float32", (2, 3)),
        entry("w", "float32", (4, 3), Box((2, 0), (2, 3))),
        entry("w[2:4,0:3]", "float32", ()),
        entry("schlüssel", "float32", (0, 7)),
        entry("__metadata__", "complex128", (1,)),
    ]
    (image,) = lay_out(chosen, {"format": "pt"})
    path = tmp_path / "x.safetensors"
    path.write_bytes(image.header + bytes(16) + w.tobytes() * 2 + np.float32(8).tobytes())
    with safe_open(path, "np") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == {"w", "w[2:4,0:3]", "w[2:4,0:3]#2", "schlüssel", "__metadata__#2"}
        assert np.array_equal(opened.get_tensor("w"), w) and np.array_equal(opened.get_tensor("w[2:4,0:3]"), w)
        assert opened.get_tensor("w[2:4,0:3]#2") == np.float32(8)
        assert opened.get_tensor("schlüssel").shape == (0, 7)
        assert opened.get_tensor("__metadata__#2").dtype == np.uint8


def test_dtypes_that_safetensors_lacks_are_bytes() -> None:
    for dtype, size in DTYPE_SIZES.items():
        header = json.loads(encode_header([entry("x", dtype, (3, 2))], {})[8:])
        known = dtype in SAFETENSORS_DTYPES
        assert header["x"]["shape"] == ([3, 2] if known else [6 * size])
        assert (header["x"]["dtype"] == "U8") == (not known or dtype == "uint8")
        assert header["x"]["data_offsets"] == [0, 6 * size]


def test_names_of_chunks() -> None:
    assert chunk_name(entry("s", "int8", ())) == "s"
    assert chunk_name(entry("w", "int8", (4, 16), Box((0, 8), (4, 8)))) == "w[0:4,8:16]"


@steady
@given(st.binary(max_size=100), st.integers(1, 30))
def test_blocks(data: bytes, size: int) -> None:
    blocks = list(slice_blocks(memoryview(data), size))
    assert b"".join(blocks) == data and len(blocks) == block_count(len(data), size)
    sums = list(map(checksum, blocks))
    packed = pack_checksums(sums)
    assert list(unpack_checksums(packed)) == sums
    assert packed == b"".join(struct.pack("<Q", value) for value in sums)


def test_a_cut_table_is_refused() -> None:
    with pytest.raises(ValueError):
        unpack_checksums(b"1234567")
