"""LocalStorage over an operating system that refuses, fails or lies: small objects, and who wins a name."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from asyncdcp.errors import CommitUnknown, StorageError, StorageFull
from asyncdcp.storage import LocalStorage
from asyncdcp.storage.posix import OS, FileStatus
from tests.storage.conftest import failure

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.parametrize("number", [errno.EIO, errno.EEXIST, errno.EPERM, errno.ETIMEDOUT])
async def test_a_link_made_whose_answer_is_lost_is_won(tmp_path: Path, number: int) -> None:
    class Lying(OS):
        def link(self, source: str, target: str, /) -> None:
            super().link(source, target)
            raise failure(number)

    assert await LocalStorage(tmp_path, posix=Lying()).claim("r", b"x") is True
    assert os.listdir(tmp_path) == ["r"]


async def test_a_link_that_failed_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    class Failing(OS):
        def link(self, source: str, target: str, /) -> None:
            raise failure(errno.EIO)

    with pytest.raises(StorageError) as caught:
        await LocalStorage(tmp_path, posix=Failing()).claim("r", b"x")
    assert type(caught.value) is StorageError and caught.value.errno == errno.EIO
    assert caught.value.path == str(tmp_path / "r")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["stat", "unlink"])
async def test_a_failed_link_that_cannot_be_looked_into_is_unknown(tmp_path: Path, call: str) -> None:
    class Blind(OS):
        def link(self, source: str, target: str, /) -> None:
            raise failure(errno.EIO)

        def stat(self, path: str, /) -> FileStatus:
            if call == "stat" and ".r." in path:
                raise failure(errno.EIO)
            return super().stat(path)

        def unlink(self, path: str, /) -> None:
            if call == "unlink":
                raise failure(errno.EIO)
            super().unlink(path)

    with pytest.raises(CommitUnknown):
        await LocalStorage(tmp_path, posix=Blind()).claim("r", b"x")
    assert not (tmp_path / "r").exists()
    assert await LocalStorage(tmp_path).list() == {}


class NoLinks(OS):
    def __init__(self, number: int = errno.EPERM) -> None:
        self.number = number

    def link(self, source: str, target: str, /) -> None:
        raise failure(self.number)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
async def test_without_links_a_rename_wins(tmp_path: Path, number: int) -> None:
    storage = LocalStorage(tmp_path, posix=NoLinks(number))
    assert await storage.claim("r", b"x") is True
    assert await storage.claim("r", b"y") is False
    with pytest.raises(FileExistsError):
        await storage.put("r", b"z")
    assert os.listdir(tmp_path) == ["r"] and await storage.get("r", 1) == b"x"


async def test_a_rename_made_whose_answer_is_lost_is_won(tmp_path: Path) -> None:
    class Lying(NoLinks):
        def rename_noreplace(self, source: str, target: str, /) -> None:
            super().rename_noreplace(source, target)
            raise failure(errno.EEXIST)

    assert await LocalStorage(tmp_path, posix=Lying()).claim("r", b"x") is True


async def test_a_temporary_that_vanished_is_not_taken_for_a_win(tmp_path: Path) -> None:
    class Swept(NoLinks):
        def rename_noreplace(self, source: str, target: str, /) -> None:
            Path(target).write_bytes(b"theirs")
            os.unlink(source)
            super().rename_noreplace(source, target)

    with pytest.raises(CommitUnknown, match="temporary is gone"):
        await LocalStorage(tmp_path, posix=Swept()).claim("r", b"ours")
    assert (tmp_path / "r").read_bytes() == b"theirs"


@pytest.mark.parametrize(("number", "match"), [(errno.EINVAL, "neither"), (errno.EIO, "Input/output")])
async def test_without_links_and_renames_there_is_no_claim(tmp_path: Path, number: int, match: str) -> None:
    class Neither(NoLinks):
        def rename_noreplace(self, source: str, target: str, /) -> None:
            raise failure(number)

    with pytest.raises(StorageError, match=match) as caught:
        await LocalStorage(tmp_path, posix=Neither()).claim("r", b"x")
    assert type(caught.value) is StorageError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
async def test_small_objects_that_cannot_be_written(tmp_path: Path, call: str) -> None:
    class Full(OS):
        def pwrite(self, fd: int, buffer: memoryview, offset: int, /) -> int:
            if call == "pwrite" and offset:
                raise failure(errno.ENOSPC)
            return super().pwrite(fd, buffer[:2], offset)

        def fsync(self, fd: int, /) -> None:
            raise failure(errno.EDQUOT)

    storage = LocalStorage(tmp_path, posix=Full())
    for attempt in (storage.put("a", b"abc"), storage.claim("a", b"abc")):
        with pytest.raises(StorageFull):
            await attempt
    assert os.listdir(tmp_path) == []


async def test_short_writes_of_small_objects_go_on(tmp_path: Path) -> None:
    class Short(OS):
        def pwrite(self, fd: int, buffer: memoryview, offset: int, /) -> int:
            return super().pwrite(fd, buffer[:3], offset)

    storage = LocalStorage(tmp_path, posix=Short())
    await storage.put("a", b"0123456789")
    assert await storage.get("a", 10) == b"0123456789"


async def test_a_cancelled_claim_comes_to_rest_whole(tmp_path: Path) -> None:
    begun, release = threading.Event(), threading.Event()

    class Slow(OS):
        def link(self, source: str, target: str, /) -> None:
            begun.set()
            assert release.wait(30)
            super().link(source, target)

    storage = LocalStorage(tmp_path, posix=Slow())
    task = asyncio.create_task(storage.claim("r", b"x"))
    assert await asyncio.to_thread(begun.wait, 30)
    task.cancel()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert os.listdir(tmp_path) == ["r"]


async def test_storages_blind_to_each_other_claim(tmp_path: Path) -> None:
    barrier = threading.Barrier(4)

    def claim(number: int) -> bool:
        async def run() -> bool:
            storage = LocalStorage(tmp_path / "new" / "place")
            barrier.wait(30)
            return await storage.claim("r", b"%d" % number)

        return asyncio.run(run())

    with ThreadPoolExecutor(4) as pool:
        won = await asyncio.to_thread(lambda: list(pool.map(claim, range(4))))
    assert sorted(won) == [False, False, False, True]
    assert (tmp_path / "new" / "place" / "r").read_bytes() == b"%d" % won.index(True)


async def test_temporaries_of_the_dead_are_found_and_deleted(tmp_path: Path) -> None:
    class Dying(OS):
        """As a process that is killed between its temporary and its link."""

        def link(self, source: str, target: str, /) -> None:
            raise LookupError("killed")

        def unlink(self, path: str, /) -> None:
            raise failure(errno.EIO)

    with pytest.raises(LookupError):
        await LocalStorage(tmp_path, posix=Dying()).claim("a.json", b"x")
    for foreign in (".a.json", ".hidden.0123"):
        (tmp_path / foreign).write_bytes(b"theirs")
    storage = LocalStorage(tmp_path)
    found = await storage.temporaries()
    assert [*found.values()] == ["a.json"] and await storage.list() == {}
    await storage.delete([*found])
    assert await storage.temporaries() == {}
    assert sorted(os.listdir(tmp_path)) == [".a.json", ".hidden.0123"]


async def test_a_claim_whose_temporary_is_deleted_publishes_nothing(tmp_path: Path) -> None:
    class Swept(OS):
        def link(self, source: str, target: str, /) -> None:
            os.unlink(source)
            super().link(source, target)

    with pytest.raises(CommitUnknown):
        await LocalStorage(tmp_path, posix=Swept()).claim("a.json", b"x")
    assert os.listdir(tmp_path) == []
