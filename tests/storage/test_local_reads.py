"""LocalStorage over an operating system that refuses, fails or stops halfway: data files being read."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from asyncdcp.errors import StorageError
from asyncdcp.storage import LocalStorage
from asyncdcp.storage.posix import OS, FileStatus
from tests.storage.conftest import DATA, Bounce, failure

pytestmark = pytest.mark.usefixtures("no_leaks")


class Reading(OS):
    """Notes how it is read; its direct descriptors are plain ones underneath."""

    def __init__(self, limit: int = 1 << 30, refuse: int = 0) -> None:
        self.direct: set[int] = set()
        self.reads: list[str] = []
        self.limit = limit
        self.refuse = refuse
        self.cached: int | None = None

    def open(self, path: str, flags: int, /) -> int:
        fd = super().open(path, flags & ~os.O_DIRECT)
        (self.direct.add if flags & os.O_DIRECT else self.direct.discard)(fd)
        return fd

    def direct_alignment(self, fd: int, /) -> int:
        return 4096

    def cached_pages(self, fd: int, offset: int, length: int, /) -> int | None:
        return self.cached

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        kind = "nowait" if flags else "direct" if fd in self.direct else "buffered"
        self.reads.append(f"{kind} {offset}")
        if self.refuse and kind != "buffered":
            raise failure(self.refuse)
        buffers = [buffers[0][: self.limit], *([] if len(buffers[0]) > self.limit else buffers[1:])]
        return super().preadv(fd, buffers, offset, 0)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "a").write_bytes(DATA)
    return tmp_path


async def test_an_aligned_tail_is_read_direct(place: Path, aligned: Bounce) -> None:
    posix = Reading()
    reader = await LocalStorage(place, posix=posix).open("a")
    buffer = aligned(bytes(40_960))
    assert reader.alignment == 4096
    assert await reader.read(0, [buffer]) == len(DATA)
    assert buffer[: len(DATA)] == DATA and posix.reads == ["direct 0"]
    assert await reader.read(1, [buffer]) == len(DATA) - 1
    assert buffer[: len(DATA) - 1] == DATA[1:] and posix.reads[1:] == ["buffered 1"]
    await reader.aclose()


async def test_short_reads_go_on(place: Path, aligned: Bounce) -> None:
    posix = Reading(limit=5000)
    reader = await LocalStorage(place, posix=posix).open("a")
    buffers = [aligned(bytes(8192)), aligned(bytes(32_768))]
    assert await reader.read(0, buffers) == len(DATA)
    assert b"".join(buffers)[: len(DATA)] == DATA
    assert posix.reads[:2] == ["direct 0", "buffered 5000"]
    await reader.aclose()


async def test_direct_reads_refused(place: Path, aligned: Bounce) -> None:
    posix = Reading(refuse=errno.EINVAL)
    reader = await LocalStorage(place, posix=posix).open("a")
    buffer = aligned(bytes(40_960))
    assert await reader.read(0, [buffer]) == len(DATA)
    assert await reader.read(0, [buffer]) == len(DATA)
    assert posix.reads == ["direct 0", "buffered 0", "buffered 0"] and reader.alignment == 1
    await reader.aclose()


async def test_a_failing_read(place: Path, aligned: Bounce) -> None:
    reader = await LocalStorage(place, posix=Reading(refuse=errno.EIO)).open("a")
    with pytest.raises(StorageError, match="cannot read") as caught:
        await reader.read(0, [aligned(bytes(4096))])
    assert caught.value.errno == errno.EIO
    await reader.aclose()


async def test_an_object_that_became_shorter(place: Path, aligned: Bounce) -> None:
    reader = await LocalStorage(place).open("a")
    os.truncate(place / "a", 5000)
    with pytest.raises(EOFError, match="5000"):
        await reader.read(0, [aligned(bytes(40_960))])
    assert not await reader.read_cached(0, [aligned(bytes(40_960))])
    await reader.aclose()


@pytest.mark.parametrize(("cached", "reads"), [(0, []), (9, []), (10, ["nowait 0"]), (None, ["nowait 0"] * 2)])
async def test_cached_reads_ask_before_they_read(
    place: Path, aligned: Bounce, cached: int | None, reads: list[str]
) -> None:
    posix = Reading()
    posix.cached = cached
    reader = await LocalStorage(place, posix=posix).open("a")
    buffer = aligned(bytes(40_960))
    assert await reader.read_cached(0, [buffer]) == bool(reads)
    assert posix.reads == reads and (not reads or buffer[: len(DATA)] == DATA)
    await reader.aclose()


@pytest.mark.parametrize(("number", "tries"), [(errno.EAGAIN, 2), (errno.EOPNOTSUPP, 1)])
async def test_cached_reads_that_would_wait(place: Path, aligned: Bounce, number: int, tries: int) -> None:
    posix = Reading(refuse=number)
    posix.cached = 10
    reader = await LocalStorage(place, posix=posix).open("a")
    assert not await reader.read_cached(0, [aligned(bytes(40_960))])
    assert not await reader.read_cached(0, [aligned(bytes(40_960))])
    assert posix.reads == ["nowait 0"] * tries
    await reader.aclose()


async def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dir").mkdir()
    storage = LocalStorage(tmp_path)
    for name in ("fifo", "dir"):
        with pytest.raises(StorageError, match="not a regular file"):
            await storage.open(name)
        with pytest.raises(StorageError, match="not a regular file"):
            await storage.get(name, 10)
    assert await storage.list() == {}


async def test_a_reader_that_cannot_be_begun_is_closed(place: Path) -> None:
    class Failing(Reading):
        def fstat(self, fd: int, /) -> FileStatus:
            raise failure(errno.EIO)

    with pytest.raises(StorageError):
        await LocalStorage(place, posix=Failing()).open("a")
