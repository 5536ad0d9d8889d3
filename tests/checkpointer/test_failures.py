"""Storages that fail at each step, staging that fails: what the futures say, what is left, that the queue goes on."""

from __future__ import annotations

import asyncio
import errno
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncdcp import AsyncCheckpointer, LocalStorage, MemoryStorage
from asyncdcp.config import Options
from asyncdcp.errors import (
    AsyncDCPError,
    Cancelled,
    CheckpointNotFound,
    MemoryLimit,
    StorageError,
    StorageFull,
)
from asyncdcp.extensions import ZStandard
from asyncdcp.pipeline.channel import Channel
from asyncdcp.pipeline.transform import Piece
from asyncdcp.staging import arenas
from asyncdcp.staging.copier import SlabCopier
from asyncdcp.storage.posix import OS
from tests.checkpointer.conftest import SMALL, STATE, Opened, wait_until, works

MIB = 1 << 20


# ── a storage that fails ──


@pytest.mark.parametrize("staging_bytes", [None, 8 * MIB])
@pytest.mark.parametrize(
    "point",
    [("list", 1), ("create", 1), ("write", 1), ("write", 3), ("finish", 1), ("put", 1), ("barrier", 1)],
    ids=lambda point: "-".join(map(str, point)),
)
def test_an_operation_that_fails(
    opened: Opened, faulty: Any, staging_bytes: int | None, point: tuple[str, int]
) -> None:
    checkpointer, storage = opened(staging_bytes=staging_bytes), faulty()
    gate, storage.errors[point] = storage.gate(*point), StorageFull("no space left on device", errno=errno.ENOSPC)
    handle = checkpointer.save(storage, STATE)
    behind = checkpointer.save(MemoryStorage("behind"), STATE)
    gate.release.set()
    with pytest.raises(StorageFull, match="no space"):
        handle.result()
    assert handle.staged.done()
    assert behind.result().tensors == 1
    with pytest.raises(CheckpointNotFound):
        checkpointer.load(storage).result()
    assert not storage.unfinished
    assert all(name.endswith(".json") for name in storage.names)
    assert works(checkpointer)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), RuntimeError("a bug in somebody's storage")])
def test_foreign_errors_are_translated_and_kept_as_cause(opened: Opened, faulty: Any, error: Exception) -> None:
    checkpointer, storage = opened(), faulty()
    storage.errors["write", 2] = error
    handle = checkpointer.save(storage, STATE)
    with pytest.raises(AsyncDCPError) as caught:
        handle.result()
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, StorageError) == isinstance(error, OSError)
    assert works(checkpointer)


@pytest.mark.parametrize("call", ["list", "create", "write", "finish", "put", "barrier", "claim"])
def test_a_storage_that_cancels_by_itself_is_no_save_that_was_cancelled(opened: Opened, faulty: Any, call: str) -> None:
    checkpointer, storage = opened(), faulty()
    storage.errors[call, 1] = asyncio.CancelledError()
    with pytest.raises(AsyncDCPError, match="nobody had asked for it"):
        checkpointer.save(storage, STATE).result()
    assert works(checkpointer)


def test_a_storage_that_cancels_a_deletion_by_itself_does_not_undo_the_commit(opened: Opened, faulty: Any) -> None:
    checkpointer, storage = opened(), faulty()
    checkpointer.save(storage, STATE).result()
    storage.errors["delete", 1] = asyncio.CancelledError()
    assert checkpointer.save(storage, STATE, overwrite=True).result().replaced


class FailingOS(OS):
    """The n-th write has no space, or the first fsync of a data file fails."""

    def __init__(self, call: str) -> None:
        self.call = call
        self.writes = 0

    def pwrite(self, fd: int, buffer: memoryview, offset: int, /) -> int:
        self.writes += 1
        if self.call == "pwrite" and self.writes == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().pwrite(fd, buffer, offset)

    def fsync(self, fd: int, /) -> None:
        if self.call == "fsync":
            self.call = ""
            raise OSError(errno.EIO, "Input/output error")
        super().fsync(fd)


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_is_full_or_broken(opened: Opened, tmp_path: Path, call: str) -> None:
    checkpointer, folder = opened(), tmp_path / "it"
    handle = checkpointer.save(LocalStorage(folder, posix=FailingOS(call)), STATE)
    with pytest.raises(StorageFull if call == "pwrite" else StorageError):
        handle.result()
    assert [path.suffix for path in folder.iterdir()] == [".json"]
    checkpointer.save(folder, STATE).result()
    assert torch.equal(checkpointer.load(folder).result()["w"], STATE["w"])


# ── staging that fails ──


def test_staging_that_fails_fails_both_futures_and_leaves_no_trace(
    opened: Opened, faulty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("a copy that fails")

    checkpointer, storage = opened(), faulty()
    for target in ("copy", "__init__"):
        monkeypatch.setattr(SlabCopier, target, broken)
        handle = checkpointer.save(storage, STATE)
        for future in handle:
            with pytest.raises(AsyncDCPError, match="a copy that fails") as caught:
                future.result()
            assert isinstance(caught.value.__cause__, ValueError)
        monkeypatch.undo()
        assert all(name.endswith(".json") for name in storage.names)
    assert works(checkpointer)


def test_staging_that_fails_before_its_turn_to_write_does_not_wait_for_it(
    opened: Opened, faulty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer, storage, never = opened(), faulty(), faulty("never")
    gate = storage.gate("write")
    checkpointer.prepare(STATE).result()  # a slot for each
    first = checkpointer.save(storage, SMALL)
    first.staged.result()
    monkeypatch.setattr(SlabCopier, "copy", lambda *_: 1 / 0)
    with pytest.raises(AsyncDCPError, match="ZeroDivisionError"):
        checkpointer.save(never, SMALL).result(20)
    assert not never.calls
    assert not first.done()
    gate.release.set()
    first.result()


def test_a_state_larger_than_memory(opened: Opened, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpointer = opened()
    huge = {"w": torch.empty(1).expand(1 << 37)}
    handle = checkpointer.save(tmp_path / "it", huge)
    for future in handle:
        with pytest.raises(MemoryLimit, match="staging_bytes"):
            future.result()
    with pytest.raises(MemoryLimit):
        checkpointer.prepare(huge).result()
    assert not (tmp_path / "it").exists()
    assert works(checkpointer)

    def full(self: Any, number: int) -> None:
        raise MemoryLimit("gone meanwhile; give a smaller staging_bytes=")

    checkpointer.prepare({"w": torch.empty(10 * MIB)}).result()
    with monkeypatch.context() as patch:
        patch.setattr(arenas.StagingArena, "prefault", full)
        with pytest.raises(MemoryLimit):
            checkpointer.save(MemoryStorage(), STATE).result()
    assert works(checkpointer)


# ── the memory of what failed ──


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("how", ["fails", "fails early", "is cancelled", "fails with extensions"])
def test_a_save_that_failed_holds_no_memory_of_the_arena(faulty: Any, how: str) -> None:
    """Not even in the frames of its tasks, which their errors keep, nor in the channel between them. The error itself
    is held here.
    """
    before, storage = _arenas(), faulty()
    extensions = [ZStandard(level=1)] if "extensions" in how else []
    number = 0 if how == "fails early" else 1
    gate, storage.errors["write", number] = storage.gate("write", number), StorageError("broken")
    with AsyncCheckpointer(process=False, extensions=extensions) as checkpointer:
        if how == "fails early":
            handle = checkpointer.save(storage, {"w": torch.ones(12 * MIB)})
            wait_until(_pieces_wait)
        else:
            handle = checkpointer.save(storage, STATE)
            gate.wait_begun()
        if how == "is cancelled":
            handle.cancel()
        gate.release.set()
        error = handle.exception(60)
    assert isinstance(error, StorageError | Cancelled)
    wait_until(lambda: _arenas() <= before)  # a thread that has told its result may have its arguments for a moment


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("how", ["fails", "is cancelled"])
def test_a_save_that_failed_holds_no_tensor(faulty: Any, how: str) -> None:
    """Of the state, half of which was not copied yet."""
    storage = faulty()
    gate, storage.errors["write", 0] = storage.gate("write"), StorageError("broken")
    with AsyncCheckpointer(Options(staging_bytes=8 * MIB), process=False) as checkpointer:
        tensor = torch.ones(6 * MIB)
        left = weakref.ref(tensor)
        handle = checkpointer.save(storage, {"w": tensor})
        del tensor
        gate.wait_begun()
        if how == "is cancelled":
            handle.cancel()
        gate.release.set()
        assert isinstance(handle.exception(60), StorageError | Cancelled)
    wait_until(lambda: left() is None)


def _arenas() -> int:
    return Path("/proc/self/maps").read_text().count("asyncdcp-arena")


def _pieces_wait() -> bool:
    channels = [each for each in gc.get_objects() if type(each) is Channel]
    return any(type(item) is Piece for channel in channels for item, _ in channel._items.copy())


def test_what_a_storage_was_handling_as_it_failed_is_shown(opened: Opened, faulty: Any) -> None:
    storage, error = faulty(), ValueError("cannot write")
    before = error.__context__ = KeyError("of a client")
    storage.errors["write", 1] = error
    failed = opened().save(storage, SMALL).exception()
    assert failed is not None
    assert failed.__cause__ is error
    assert error.__context__ is before
    assert not error.__suppress_context__
