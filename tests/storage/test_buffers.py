"""Buffers for direct I/O."""

from __future__ import annotations

import ctypes

import pytest

from asyncdcp.storage.files import io_buffer


@pytest.mark.parametrize("nbytes", [1, 4096, 8 << 20])
def test_a_buffer_is_aligned_writable_and_of_the_size_asked_for(nbytes: int) -> None:
    buffer = io_buffer(nbytes)
    assert len(buffer) == nbytes
    assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % (2 << 20) == 0
    buffer[-1] = 7
    assert buffer[-1] == 7
    del buffer
