"""LocalStorage over an operating system that refuses, fails, stops halfway or hangs: data files being written."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from asyncdcp.errors import Closed, InvalidOption, StorageError, StorageFull, UsageError
from asyncdcp.storage import LocalStorage, Storage
from asyncdcp.storage.posix import OS
from tests.storage.conftest import DATA, Bounce, failure

pytestmark = pytest.mark.usefixtures("no_leaks")


class Direct(OS):
    """Has direct I/O by its word, wherever the tests run, and checks its rules as strictly as any device."""

    def __init__(self) -> None:
        self.direct: set[int] = set()
        self.calls: list[str] = []

    def direct_alignment(self, fd: int, /) -> int:
        return 4096

    def set_direct(self, fd: int, /, *, on: bool) -> None:
        self.calls.append(f"direct {on}")
        (self.direct.add if on else self.direct.discard)(fd)

    def close(self, fd: int, /) -> None:
        self.direct.discard(fd)
        super().close(fd)

    def pwrite(self, fd: int, buffer: memoryview, offset: int, /) -> int:
        if fd in self.direct and (len(buffer) % 4096 or offset % 4096):
            raise failure(errno.EINVAL)
        self.calls.append(f"write {offset}+{len(buffer)}")
        return super().pwrite(fd, buffer, offset)

    def fsync(self, fd: int, /) -> None:
        self.calls.append("fsync")
        super().fsync(fd)


async def written(posix: OS, tmp_path: Path, aligned: Bounce, hint: int = 0) -> int:
    """Writes DATA in one padded write, checks that it came back, and returns the alignment at the end."""
    storage: Storage = LocalStorage(tmp_path, posix=posix)
    writer = await storage.create("a", hint)
    await writer.write(0, aligned(DATA.ljust(40_960, b"#")))
    alignment = writer.alignment
    await writer.finish(len(DATA))
    assert (tmp_path / "a").read_bytes() == DATA
    return alignment


async def aborted(posix: OS, tmp_path: Path, aligned: Bounce) -> StorageError:
    """The error that writing DATA came to; afterwards nothing is left."""
    storage = LocalStorage(tmp_path, posix=posix)
    writer = await storage.create("a", 0)
    with pytest.raises(StorageError) as caught:
        await writer.write(0, aligned(DATA.ljust(40_960, b"#")))
        await writer.finish(len(DATA))
    with pytest.raises((StorageError, Closed)):
        await writer.finish(len(DATA))
    await writer.abort()
    assert os.listdir(tmp_path) == []
    assert caught.value.path == str(tmp_path / "a")
    return caught.value


async def test_direct_all_the_way(tmp_path: Path, aligned: Bounce) -> None:
    posix = Direct()
    assert await written(posix, tmp_path, aligned, hint=len(DATA)) == 4096
    assert posix.calls == ["direct True", "write 0+40960", "fsync"]


async def test_refused_when_the_flag_is_set(tmp_path: Path, aligned: Bounce) -> None:
    class Refusing(Direct):
        def set_direct(self, fd: int, /, *, on: bool) -> None:
            raise failure(errno.EINVAL)

    assert await written(Refusing(), tmp_path, aligned) == 1


async def test_refused_by_statx(tmp_path: Path, aligned: Bounce) -> None:
    class Refusing(Direct):
        def direct_alignment(self, fd: int, /) -> int:
            return 0

    posix = Refusing()
    assert await written(posix, tmp_path, aligned) == 1
    assert "direct True" not in posix.calls


async def test_refused_at_the_first_writes(tmp_path: Path, aligned: Bounce) -> None:
    class Refusing(Direct):
        def pwrite(self, fd: int, buffer: memoryview, offset: int, /) -> int:
            if fd in self.direct:
                raise failure(errno.EINVAL)
            return super().pwrite(fd, buffer, offset)

    posix = Refusing()
    storage = LocalStorage(tmp_path, posix=posix)
    writer = await storage.create("a", 0)
    async with asyncio.TaskGroup() as group:
        for n in range(8):
            group.create_task(writer.write(n * 4096, aligned(bytes([n]) * 4096)))
    assert writer.alignment == 1
    await writer.write(8 * 4096, memoryview(b"odd"))
    await writer.finish(8 * 4096 + 3)
    assert (tmp_path / "a").read_bytes() == b"".join(bytes([n]) * 4096 for n in range(8)) + b"odd"


async def test_larger_alignment_is_passed_on(tmp_path: Path, aligned: Bounce) -> None:
    class Coarse(Direct):
        def direct_alignment(self, fd: int, /) -> int:
            return 16384

    writer = await LocalStorage(tmp_path, posix=Coarse()).create("a", 0)
    assert writer.alignment == 16384
    with pytest.raises(InvalidOption, match="16384"):
        await writer.write(0, aligned(bytes(4096)))
    await writer.abort()


@pytest.mark.parametrize("shift", [0, 1])
async def test_misaligned_writes_are_the_callers_fault(tmp_path: Path, aligned: Bounce, shift: int) -> None:
    writer = await LocalStorage(tmp_path, posix=Direct()).create("a", 0)
    page = aligned(bytes(8192))
    for offset, buffer in ((512, page), (0, page[:5000]), (0, page[1:4097]), (0, page.toreadonly()[1:4097])):
        with pytest.raises(InvalidOption, match="aligned to 4096"):
            await writer.write(offset, buffer)
    await writer.write(0, page.toreadonly()[4096 * shift :])
    await writer.finish(10)


@pytest.mark.parametrize("short", [4096, 4097, 8191, 12_288])
async def test_short_direct_writes_go_on_from_an_aligned_offset(tmp_path: Path, aligned: Bounce, short: int) -> None:
    class Short(Direct):
        def pwrite(self, fd: int, buffer: memoryview, offset: int, /) -> int:
            super().pwrite(fd, buffer, offset)
            return min(len(buffer), short)

    assert await written(Short(), tmp_path, aligned) == 4096


@pytest.mark.parametrize("short", [0, 1000])
async def test_direct_writes_that_get_nowhere_fall_back(tmp_path: Path, aligned: Bounce, short: int) -> None:
    class Short(Direct):
        def pwrite(self, fd: int, buffer: memoryview, offset: int, /) -> int:
            if fd in self.direct:
                return short
            return super().pwrite(fd, buffer[:999], offset)

    assert await written(Short(), tmp_path, aligned) == 1


async def test_buffered_writes_that_get_nowhere_are_an_error(tmp_path: Path, aligned: Bounce) -> None:
    class Nothing(Direct):
        def pwrite(self, fd: int, buffer: memoryview, offset: int, /) -> int:
            return 0

    assert (await aborted(Nothing(), tmp_path, aligned)).errno == errno.EIO


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
async def test_failing_writes(tmp_path: Path, aligned: Bounce, number: int) -> None:
    class Failing(Direct):
        def pwrite(self, fd: int, buffer: memoryview, offset: int, /) -> int:
            if offset:
                raise failure(number)
            return super().pwrite(fd, buffer[:8192], offset)

    error = await aborted(Failing(), tmp_path, aligned)
    assert type(error) is (StorageError if number == errno.EIO else StorageFull)
    assert error.errno == number and "write" in str(error)


@pytest.mark.parametrize("call", ["fsync", "ftruncate", "close"])
async def test_a_failed_finish_is_final(tmp_path: Path, aligned: Bounce, call: str) -> None:
    attempts = []

    class Failing(Direct):
        def fsync(self, fd: int, /) -> None:
            attempts.append("fsync")
            if call == "fsync" and len(attempts) == 1:
                raise failure(errno.EIO)

        def ftruncate(self, fd: int, length: int, /) -> None:
            if call == "ftruncate":
                raise failure(errno.EIO)

        def close(self, fd: int, /) -> None:
            super().close(fd)
            if call == "close":
                raise failure(errno.EIO)

    assert (await aborted(Failing(), tmp_path, aligned)).errno == errno.EIO
    assert len(attempts) <= 1


async def test_full_at_allocation(tmp_path: Path) -> None:
    class Full(OS):
        def fallocate(self, fd: int, length: int, /) -> None:
            raise failure(errno.ENOSPC)

    storage = LocalStorage(tmp_path / "deep", posix=Full())
    with pytest.raises(StorageFull):
        await storage.create("a", 10)
    assert await storage.list() == {}
    await (await storage.create("a", 0)).abort()


async def test_no_fallocate_does_not_matter(tmp_path: Path, aligned: Bounce) -> None:
    class Without(Direct):
        def fallocate(self, fd: int, length: int, /) -> None:
            raise failure(errno.EOPNOTSUPP)

    assert await written(Without(), tmp_path, aligned, hint=1 << 50) == 4096


async def test_create_does_not_touch_what_exists(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        await LocalStorage(tmp_path).create("a", 0)
    assert (tmp_path / "a").read_bytes() == b"old"


class Stuck(Direct):
    """Its writes begin, and end only when they are let."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Event()
        self.release = threading.Event()

    def pwrite(self, fd: int, buffer: memoryview, offset: int, /) -> int:
        self.begun.set()
        assert self.release.wait(30)
        return super().pwrite(fd, buffer, offset)


async def test_a_cancelled_write_returns_the_buffer_when_it_is_done(tmp_path: Path, aligned: Bounce) -> None:
    posix = Stuck()
    writer = await LocalStorage(tmp_path, posix=posix).create("a", 0)
    task = asyncio.create_task(writer.write(0, aligned(bytes(4096))))
    assert await asyncio.to_thread(posix.begun.wait, 30)
    task.cancel()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done()
    with pytest.raises(UsageError, match="under way"):
        await writer.finish(4096)
    posix.release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "write 0+4096" in posix.calls
    await writer.abort()
    assert os.listdir(tmp_path) == []


async def test_abort_during_a_write_leaves_the_descriptor_to_it(tmp_path: Path, aligned: Bounce) -> None:
    posix = Stuck()
    writer = await LocalStorage(tmp_path, posix=posix).create("a", 0)
    task = asyncio.create_task(writer.write(0, aligned(bytes(4096))))
    assert await asyncio.to_thread(posix.begun.wait, 30)
    await writer.abort()
    other = os.open("/dev/null", os.O_RDONLY)
    posix.release.set()
    await task
    os.close(other)
    assert os.listdir(tmp_path) == []


async def test_a_cancelled_finish_is_aborted_whole(tmp_path: Path, aligned: Bounce) -> None:
    begun, release = threading.Event(), threading.Event()

    class SlowSync(Direct):
        def fsync(self, fd: int, /) -> None:
            begun.set()
            assert release.wait(30)

    writer = await LocalStorage(tmp_path, posix=SlowSync()).create("a", 0)
    task = asyncio.create_task(writer.finish(0))
    assert await asyncio.to_thread(begun.wait, 30)
    task.cancel()
    asyncio.get_running_loop().call_later(0, release.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    await writer.abort()
    assert os.listdir(tmp_path) == []


async def test_without_direct_io_the_flag_is_never_asked_for(tmp_path: Path, aligned: Bounce) -> None:
    posix = Direct()
    storage = LocalStorage(tmp_path, direct_io=False, posix=posix)
    writer = await storage.create("a", 0)
    assert writer.alignment == 1
    await writer.write(0, memoryview(b"odd"))
    await writer.finish(3)
    reader = await storage.open("a")
    assert reader.alignment == 1
    await reader.aclose()
    assert posix.calls == ["write 0+3", "fsync"]
