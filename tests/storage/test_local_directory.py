"""LocalStorage over an operating system that refuses or fails: its directory, and what makes names in it durable."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from asyncdcp.errors import CommitUnknown, StorageError
from asyncdcp.storage import LocalPlace, LocalStorage
from asyncdcp.storage.posix import OS, FileStatus
from tests.storage.conftest import failure

pytestmark = pytest.mark.usefixtures("no_leaks")


class Recorder(OS):
    """Notes what is made, named and synced in ``root``, by path relative to it; temporaries as "temp". What is above is
    in ``above``.
    """

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.calls: list[str] = []
        self.above: list[str] = []
        self.paths: dict[int, str] = {}

    def note(self, call: str, path: str) -> None:
        name = os.path.relpath(path, self.root)
        calls = self.above if name.startswith("..") else self.calls
        calls.append(f"{call} {'temp' if os.path.basename(name).startswith('.') and name != '.' else name}")

    def open(self, path: str, flags: int, /) -> int:
        fd = super().open(path, flags)
        self.paths[fd] = path
        return fd

    def fsync(self, fd: int, /) -> None:
        self.note("fsync", self.paths[fd])
        super().fsync(fd)

    def mkdir(self, path: str, /) -> None:
        self.note("mkdir", path)
        super().mkdir(path)

    def link(self, source: str, target: str, /) -> None:
        self.note("link", target)
        super().link(source, target)

    def rename_noreplace(self, source: str, target: str, /) -> None:
        self.note("rename", target)
        super().rename_noreplace(source, target)

    def unlink(self, path: str, /) -> None:
        self.note("unlink", path)
        super().unlink(path)


async def test_the_order_of_syncs(tmp_path: Path) -> None:
    posix = Recorder(tmp_path)
    storage = LocalStorage(tmp_path / "a" / "b", posix=posix)
    writer = await storage.create("data", 0)
    await writer.finish(0)
    await storage.barrier()
    assert posix.calls == ["mkdir a", "mkdir a/b", "fsync a/b/data", "fsync a/b", "fsync a", "fsync ."]
    posix.calls.clear()
    await storage.barrier()
    assert posix.calls == ["fsync a/b"]
    posix.calls.clear()
    assert await storage.claim("record", b"x")
    assert posix.calls == ["fsync temp", "link a/b/record", "unlink temp", "fsync a/b"]


async def test_what_was_there_before_is_synced_once(tmp_path: Path) -> None:
    """Whoever made the directories may have died before they were synced."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    posix = Recorder(tmp_path)
    storage = LocalStorage(tmp_path / "a" / "b", posix=posix)
    await storage.barrier()
    assert posix.calls == ["fsync a/b", "fsync a", "fsync ."]
    assert posix.above
    posix.above.clear()
    await storage.barrier()
    assert posix.calls[3:] == ["fsync a/b"] and posix.above == []


@pytest.mark.parametrize("made", [True, False])
async def test_a_directory_above_that_may_not_be_read(tmp_path: Path, made: bool) -> None:
    class Closed(Recorder):
        def open(self, path: str, flags: int, /) -> int:
            if path == str(tmp_path):
                raise failure(errno.EACCES)
            return super().open(path, flags)

    if not made:
        (tmp_path / "a").mkdir()
    storage = LocalStorage(tmp_path / "a", posix=Closed(tmp_path))
    await storage.put("x", b"")
    if made:
        with pytest.raises(StorageError, match="Permission"):
            await storage.barrier()
    else:
        await storage.barrier()


async def test_a_claim_in_a_new_place_syncs_its_ancestors(tmp_path: Path) -> None:
    posix = Recorder(tmp_path)
    assert await LocalStorage(tmp_path / "a" / "b", posix=posix).claim("r", b"x")
    assert posix.calls[2:] == ["fsync temp", "link a/b/r", "unlink temp", "fsync a/b", "fsync a", "fsync ."]


async def test_a_parent_that_somebody_else_made_meanwhile_is_synced(tmp_path: Path) -> None:
    class Raced(Recorder):
        def mkdir(self, path: str, /) -> None:
            os.mkdir(path)
            super().mkdir(path)

    posix = Raced(tmp_path)
    storage = LocalStorage(tmp_path / "a", posix=posix)
    await storage.put("x", b"")
    await storage.barrier()
    assert posix.calls[-2:] == ["fsync a", "fsync ."]


async def test_a_lost_claim_syncs_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    posix = Recorder(tmp_path)
    storage = LocalStorage(tmp_path, posix=posix)
    (tmp_path / "r").write_bytes(b"theirs")
    assert await storage.claim("r", b"ours") is False
    assert posix.calls == ["fsync temp", "link r", "unlink temp"]
    assert os.listdir(tmp_path) == ["r"] and (tmp_path / "r").read_bytes() == b"theirs"


class BadDirectory(Recorder):
    """Cannot sync directories, at the first try only: as a kernel reports a lost write once."""

    number = errno.EIO
    failed = False

    def fsync(self, fd: int, /) -> None:
        if os.path.isdir(self.paths[fd]) and not self.failed:
            self.failed = True
            raise failure(self.number)
        super().fsync(fd)


async def test_a_claim_whose_directory_cannot_be_synced_is_unknown(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path, posix=BadDirectory(tmp_path))
    with pytest.raises(CommitUnknown) as caught:
        await storage.claim("r", b"x")
    assert caught.value.errno == errno.EIO
    assert os.listdir(tmp_path) == ["r"]


async def test_a_failed_directory_sync_is_never_followed_by_success(tmp_path: Path) -> None:
    posix = BadDirectory(tmp_path)
    storage = LocalStorage(tmp_path, posix=posix)
    await storage.put("a", b"")
    with pytest.raises(StorageError):
        await storage.barrier()
    with pytest.raises(StorageError, match="earlier sync"):
        await storage.barrier()
    posix.calls.clear()
    with pytest.raises(StorageError, match="earlier sync") as caught:
        await storage.claim("r", b"")
    assert type(caught.value) is StorageError
    assert posix.calls == [] and os.listdir(tmp_path) == ["a"]


async def test_directories_that_have_no_sync_are_accepted(tmp_path: Path) -> None:
    posix = BadDirectory(tmp_path)
    posix.number = errno.EINVAL
    assert await LocalStorage(tmp_path, posix=posix).claim("r", b"x")


async def test_temporaries_are_hidden_and_foreign_names_listed(tmp_path: Path) -> None:
    for name in (".r.0123", "r", "model (1).bin"):
        (tmp_path / name).write_bytes(b"x")
    assert await LocalStorage(tmp_path).list() == {"r": 1, "model (1).bin": 1}


async def test_a_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    for storage in (LocalStorage(tmp_path / "f"), LocalStorage(tmp_path / "f" / "x")):
        for attempt in (storage.put("a", b""), storage.claim("a", b""), storage.create("a", 0), storage.list()):
            with pytest.raises(StorageError):
                await attempt


async def test_a_place_that_vanishes_is_an_error(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "a")
    await storage.put("x", b"")
    os.unlink(tmp_path / "a" / "x")
    os.rmdir(tmp_path / "a")
    with pytest.raises(StorageError):
        await storage.barrier()


async def test_a_log_that_takes_nothing_is_an_error(tmp_path: Path) -> None:
    class Nothing(OS):
        def pwrite(self, fd: int, buffer: memoryview, offset: int, /) -> int:
            return 0

    with pytest.raises(StorageError, match="append to") as caught:
        await LocalPlace(tmp_path, posix=Nothing()).append("log", b"line")
    assert caught.value.errno == errno.EIO


async def test_a_link_to_what_is_not_there_is_named_with_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    for storage in (LocalStorage(tmp_path / "link"), LocalStorage(tmp_path / "link" / "x")):
        for attempt in (storage.put("a", b""), storage.create("a", 0)):
            with pytest.raises(StorageError, match=f"{tmp_path}/link is a link to nowhere, which is not there; make"):
                await attempt


@pytest.mark.parametrize("call", ["open", "scan"])
async def test_a_limit_on_open_files_is_told_and_no_damage_of_what_is_there(tmp_path: Path, call: str) -> None:
    await LocalPlace(tmp_path).child("step_1").put("a.json", b"x")

    class Limited(OS):
        def open(self, path: str, flags: int, /) -> int:
            raise failure(errno.EMFILE) if call == "open" else AssertionError

        def scan(self, path: str, /) -> dict[str, FileStatus]:
            if call == "scan" and path.endswith("step_1"):
                raise failure(errno.EMFILE)
            return super().scan(path)

    with pytest.raises(StorageError, match=f"cannot list {tmp_path}: Too many open files; raise RLIMIT_NOFILE"):
        await LocalPlace(tmp_path, posix=Limited()).survey(lambda child, name: True, 10)
