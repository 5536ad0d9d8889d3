"""Storages that fail at each step, staging that fails: what the futures say, what is left, that the queue goes on."""

from __future__ import annotations

import errno
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncdcp import AsyncCheckpointer, LocalStorage, MemoryStorage
from asyncdcp.errors import (
    AsyncDCPError,
    Cancelled,
    CheckpointNotFound,
    MemoryLimit,
    StorageError,
    StorageFull,
)
from asyncdcp.extensions import ZStandard
from asyncdcp.staging import arenas
from asyncdcp.staging.copier import SlabCopier
from asyncdcp.storage.posix import OS
from tests.checkpointer.conftest import SMALL, STATE, Opened, works

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
    storage.errors[point] = StorageFull("no space left on device", errno=errno.ENOSPC)
    handle = checkpointer.save(storage, STATE)
    behind = checkpointer.save(MemoryStorage("behind"), STATE)
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


@pytest.fixture
def uncollected() -> Iterator[None]:
    """The garbage collector comes by only before."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("how", ["fails", "is cancelled", "fails with extensions"])
def test_a_save_that_failed_holds_no_memory_of_the_arena(faulty: Any, how: str) -> None:
    """Not even in the frames of its tasks, which their errors keep. The error itself is held here."""
    before, storage = _arenas(), faulty()
    extensions = [ZStandard(level=1)] if "extensions" in how else []
    with AsyncCheckpointer(process=False, extensions=extensions) as checkpointer:
        if how == "is cancelled":
            gate = storage.gate("write", 1)
            handle = checkpointer.save(storage, STATE)
            gate.wait_begun()
            handle.cancel()
            gate.release.set()
        else:
            storage.errors["write", 1] = StorageError("broken")
            handle = checkpointer.save(storage, STATE)
        error = handle.exception(60)
    assert isinstance(error, StorageError | Cancelled)
    until = time.monotonic() + 10  # a thread that has told its result may not have let go of its arguments yet
    while _arenas() != before:
        assert time.monotonic() < until, "the arena is still held"
        time.sleep(0.001)


def _arenas() -> int:
    return Path("/proc/self/maps").read_text().count("asyncdcp-arena")
