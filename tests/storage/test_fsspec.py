"""Storages by way of fsspec: its memory, where files appear whole, and its local files, where they are renamed."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import threading
from pathlib import Path
from typing import IO

import pytest
import torch

from asyncdcp import SyncCheckpointer
from asyncdcp.errors import (
    Closed,
    CommitUnknown,
    InvalidOption,
    MissingDependency,
    StorageError,
    StorageFull,
    UsageError,
)
from asyncdcp.storage import Storage, open_storage, spec_of
from asyncdcp.storage.fsspec import FsspecStorage
from asyncdcp.testing.storage import STORAGE_CHECKS, Check, StorageKit

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(params=["memory", "file"])
def kit(request: pytest.FixtureRequest, tmp_path: Path) -> StorageKit:
    numbers = itertools.count()

    def make() -> Storage:
        return FsspecStorage(f"{request.param}://{tmp_path}/{next(numbers)}/deep", single_writer=True)

    return StorageKit(make, lambda storage: FsspecStorage(storage.info.location, single_writer=True))


@pytest.mark.parametrize("check", STORAGE_CHECKS, ids=lambda check: check.__name__)
async def test_promises(kit: StorageKit, check: Check) -> None:
    await check(kit)


def test_a_round_trip(tmp_path: Path) -> None:
    with SyncCheckpointer(process=False) as checkpointer:
        storage = FsspecStorage(f"memory://{tmp_path}/step_1", single_writer=True)
        checkpointer.save(storage, {"x": torch.arange(5)})
        reader = FsspecStorage(f"memory://{tmp_path}/step_1")
        assert torch.equal(checkpointer.load(reader)["x"], torch.arange(5))
    assert spec_of(storage) is None


async def test_it_saves_only_where_nobody_else_does(tmp_path: Path) -> None:
    storage = FsspecStorage(f"memory://{tmp_path}")
    for call in (storage.create("a", 0), storage.claim("a", b""), storage.put("a", b"")):
        with pytest.raises(UsageError, match="single_writer=True"):
            await call
    assert await storage.list() == {}


async def test_what_has_changed_is_found_before_the_commit(tmp_path: Path) -> None:
    storage = FsspecStorage(f"file://{tmp_path}", single_writer=True)
    await storage.put("a", b"four")
    (tmp_path / "a").write_bytes(b"longer")
    with pytest.raises(StorageError, match="6 bytes, and 4 were stored"):
        await storage.barrier()
    (tmp_path / "a").unlink()
    with pytest.raises(StorageError, match=r"cannot verify file://.*/a: "):
        await storage.barrier()


async def test_what_cannot_be_stored_whole_is_removed_and_its_name_is_free(tmp_path: Path) -> None:
    class Full(FsspecStorage):
        def store(self, name: str, file: IO[bytes]) -> None:
            (tmp_path / name).write_bytes(file.read(2))
            raise OSError(errno.ENOSPC, "there is no more room")

    storage = Full(f"file://{tmp_path}", single_writer=True)
    writer = await storage.create("a", 0)
    await writer.write(0, memoryview(b"four"))
    with pytest.raises(StorageFull, match=r"cannot write file://.*/a: .*there is no more room") as caught:
        await writer.finish(4)
    assert caught.value.errno == errno.ENOSPC and os.listdir(tmp_path) == ["a"]
    with pytest.raises(Closed):
        await writer.finish(4)
    await writer.abort()
    assert os.listdir(tmp_path) == []
    await (await storage.create("a", 0)).abort()


async def test_a_connection_that_is_lost_is_no_damage(tmp_path: Path) -> None:
    """paramiko, below sftp://, says so by an EOFError without a word; to the port that is an object become shorter."""

    class Lossy(FsspecStorage):
        def read_range(self, name: str, begin: int, end: int) -> bytes:
            raise EOFError

    storage = Lossy(f"file://{tmp_path}", single_writer=True)
    await storage.put("a", b"four")
    with pytest.raises(StorageError, match=r"cannot read file://.*/a: EOFError"):
        await storage.get("a", 4)


@pytest.mark.parametrize("failure", [TimeoutError, EOFError, FileNotFoundError])
@pytest.mark.parametrize(
    ("carried_out", "readable", "outcome"),
    [(True, True, "won"), (False, True, StorageError), (True, False, CommitUnknown), (False, False, CommitUnknown)],
)
async def test_a_claim_that_failed_is_looked_into(
    tmp_path: Path, carried_out: bool, readable: bool, outcome: str | type[StorageError], failure: type[Exception]
) -> None:
    """A rename that was sent again after its answer was lost fails by a FileNotFoundError."""

    class Lossy(FsspecStorage):
        def store_new(self, name: str, data: bytes) -> bool:
            if carried_out:
                super().store_new(name, data)
            raise failure("no answer")

        def size_of(self, name: str) -> int:
            if not readable:
                raise TimeoutError("no answer either")
            return super().size_of(name)

    storage = Lossy(f"file://{tmp_path}", single_writer=True)
    if isinstance(outcome, str):
        assert await storage.claim("a", b"mine")
        assert not await storage.claim("a", b"a longer one of another's")
        return
    with pytest.raises(StorageError, match="no answer") as caught:
        await storage.claim("a", b"mine")
    assert type(caught.value) is outcome


async def test_what_another_takes_away_after_the_claim_holds_up_no_later_save(tmp_path: Path) -> None:
    """The Record of a save that another one replaces: once won it is durable, and is no barrier's business."""
    storage, other = (FsspecStorage(f"file://{tmp_path}", single_writer=True) for _ in range(2))
    assert await storage.claim("a", b"mine")
    await other.delete(["a"])
    await storage.barrier()


async def test_why_an_object_was_stored_in_part_is_told(tmp_path: Path) -> None:
    class Full(FsspecStorage):
        def store_new(self, name: str, data: bytes) -> bool:
            (tmp_path / name).write_bytes(data[:2])
            raise OSError(errno.ENOSPC, "there is no more room")

    with pytest.raises(StorageFull, match="there is no more room"):
        await Full(f"file://{tmp_path}", single_writer=True).put("a", b"four")


async def test_of_two_that_create_a_name_at_once_one_is_refused(tmp_path: Path) -> None:
    storage = FsspecStorage(f"file://{tmp_path}", single_writer=True)
    first, second = await asyncio.gather(storage.create("a", 0), storage.create("a", 0), return_exceptions=True)
    assert isinstance(second, FileExistsError) and not isinstance(first, BaseException)
    await first.abort()


async def test_a_write_that_goes_on_after_its_abort_writes_to_nobody_elses_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, release, pwrite = threading.Event(), threading.Event(), os.pwrite

    def slow(fd: int, data: memoryview, offset: int) -> int:
        begun.set()
        assert release.wait(30)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    writer = await FsspecStorage(f"memory://{tmp_path}", single_writer=True).create("a", 0)
    task = asyncio.create_task(writer.write(0, memoryview(b"four")))
    assert await asyncio.to_thread(begun.wait, 30)
    await writer.abort()
    other = os.open(tmp_path / "other", os.O_CREAT | os.O_RDWR)  # gets the number, if that is free
    release.set()
    await task
    assert os.fstat(other).st_size == 0
    os.close(other)


def test_a_password_in_the_url_is_shown_to_nobody() -> None:
    """Where a storage is stands in logs, errors, events and a user's terminal."""
    storage = FsspecStorage("memory://ann:s3cret@host/run", single_writer=True)
    assert storage.info.location == "memory://ann:***@host/run"
    with pytest.raises(MissingDependency, match="sftp://ann:") as caught:
        FsspecStorage("sftp://ann:s3cret@host/x")
    assert "s3cret" not in str(caught.value)
    with pytest.raises(InvalidOption) as refused:
        FsspecStorage("nonsense://ann:s3cret@host/x")
    assert "s3cret" not in str(refused.value)


def test_what_cannot_be_had_is_named() -> None:
    with pytest.raises(InvalidOption, match="nonsense"):
        FsspecStorage("nonsense://x")
    with pytest.raises(MissingDependency, match="sftp://host/x needs a package"):
        FsspecStorage("sftp://host/x")
    with pytest.raises(InvalidOption, match="FsspecStorage"):
        open_storage("hf://buckets/x")
