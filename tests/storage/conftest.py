from __future__ import annotations

import mmap
import os
from collections.abc import AsyncIterator, Callable

import pytest

Bounce = Callable[[bytes], memoryview]
DATA = os.urandom(40_000)


def failure(number: int) -> OSError:
    """As the system raises it."""
    return OSError(number, os.strerror(number))


@pytest.fixture
async def no_leaks() -> AsyncIterator[None]:
    """The test leaves no file open. What another one has left to the garbage collector may go meanwhile."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) <= before


@pytest.fixture
def aligned() -> Bounce:
    """Makes a writable buffer on a page boundary that holds the given bytes."""

    def make(data: bytes) -> memoryview:
        view = memoryview(mmap.mmap(-1, max(1, len(data))))
        view[: len(data)] = data
        return view[: len(data)]

    return make
