"""Frames that the zstd program reads, blocks that are not worth compressing, and frames that mean harm."""

from __future__ import annotations

import io
import os
import shutil
import subprocess

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdcp import AESGCM, BytePlanes, ZStandard
from asyncdcp.errors import CorruptCheckpoint, InvalidOption
from asyncdcp.extensions import BlockExtension, Chain, Extension
from asyncdcp.testing.extensions import context

MIB = 1 << 20
steady = settings(deadline=None, derandomize=True, max_examples=30)
EXTENSIONS: list[Extension] = [ZStandard(), BytePlanes(), AESGCM(bytes(32)), ZStandard(-5)]


def stored(extension: BlockExtension, data: bytes) -> bytes:
    return bytes(extension.encode(memoryview(data), context()))


def decoded(data: bytes, length: int) -> bytes:
    return bytes(Chain([ZStandard()]).decode(memoryview(data), context(), length))


def mixed() -> bytes:
    """Noise, numbers, zeros and noise again, so that all ways are taken, with borders between them."""
    numbers = np.random.default_rng(0).standard_normal(150_000).astype(np.float32).tobytes()
    return os.urandom(300_000) + numbers + bytes(200_000) + b"abcdefghij" * 30_000 + os.urandom(5)


@pytest.mark.skipif(shutil.which("zstd") is None, reason="the zstd program is not installed")
@pytest.mark.parametrize("level", [1, 19])
def test_the_program_reads_what_is_stored(level: int) -> None:
    content = mixed()
    ran = subprocess.run(["zstd", "-dc"], input=stored(ZStandard(level), content), capture_output=True, check=True)
    assert ran.stdout == content


def test_the_library_reads_what_is_stored_as_one_stream() -> None:
    content = mixed()
    reader = zstandard.ZstdDecompressor().stream_reader(
        io.BytesIO(stored(ZStandard(), content)), read_across_frames=True
    )
    assert reader.read() == content


@pytest.mark.parametrize("length", [1, 5, (128 << 10) - 1, 256 << 10, (256 << 10) + 1, MIB])
def test_noise_is_stored_as_it_is(length: int) -> None:
    noise = os.urandom(length)
    kept = stored(ZStandard(), noise)
    assert len(kept) < length + 128
    assert noise[: 128 << 10] in kept
    assert decoded(kept, length) == noise


def test_numbers_become_as_small_as_they_can() -> None:
    numbers = (np.random.default_rng(1).standard_normal(MIB // 2) * 0.02).astype(np.float32)
    half = (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # bfloat16
    chain = Chain([BytePlanes(), ZStandard()])
    place = context(element_size=2)
    assert len(chain.encode(memoryview(half), place)) < 0.675 * MIB < 0.75 * MIB < len(stored(ZStandard(), half))
    assert len(stored(ZStandard(), bytes(MIB))) < 200


@steady
@given(st.lists(st.sampled_from(EXTENSIONS), max_size=5), st.binary(min_size=1, max_size=5000), st.integers(0, 17))
def test_any_chain_gives_back_any_block(extensions: list[Extension], content: bytes, element_size: int) -> None:
    chain, place = Chain(extensions), context(element_size=element_size)
    kept = bytes(chain.encode(memoryview(content), place))
    assert chain.decode(memoryview(kept), place, len(content)) == content


# ── harm ──


def test_a_bomb_is_refused_by_what_it_says() -> None:
    bomb = zstandard.ZstdCompressor(19).compress(bytes(64 << 20))  # in a few KiB
    with pytest.raises(
        CorruptCheckpoint, match=r"block 0 cannot be decoded by stream.zstd/1: a frame of 67108864 bytes"
    ):
        decoded(bomb, MIB)


def test_bombs_that_say_nothing_or_lie_are_refused() -> None:
    quiet = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(MIB))
    with pytest.raises(CorruptCheckpoint, match="unknown size"):
        decoded(quiet, MIB)
    honest = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(bytes(range(256)) * 4096))
    size = honest.index((MIB).to_bytes(4, "little"))
    honest[size : size + 4] = (1000).to_bytes(4, "little")
    with pytest.raises(CorruptCheckpoint, match="damaged"):
        decoded(bytes(honest), 1000)
    with pytest.raises(CorruptCheckpoint, match=f"of at most {MIB // 2}"):
        decoded(zstandard.compress(bytes(MIB)), MIB // 2)
    with pytest.raises(CorruptCheckpoint, match="of at most 24"):  # no frame alone is too long
        decoded(zstandard.compress(bytes(1000)) * 2, 1024)


def test_it_has_the_right_length() -> None:
    with pytest.raises(CorruptCheckpoint, match="it has 5 bytes of 6"):
        decoded(stored(ZStandard(), b"hello"), 6)


@pytest.mark.parametrize("content", [b"x" * 1000, os.urandom(1000)], ids=["compressed", "stored"])
def test_every_truncation_and_every_flipped_bit_of_content_is_found(content: bytes) -> None:
    kept = stored(ZStandard(), content)
    for end in range(len(kept)):
        with pytest.raises(CorruptCheckpoint):
            decoded(kept[:end], len(content))
    for bit in range(len(kept) * 8):
        flipped = bytearray(kept)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            assert decoded(bytes(flipped), len(content)) == content  # a bit of the header that means nothing
        except CorruptCheckpoint:
            continue


@pytest.mark.parametrize("level", [23, -101, 1.0, True, "1"])
def test_levels(level: int) -> None:
    with pytest.raises(InvalidOption, match="level takes"):
        ZStandard(level)
