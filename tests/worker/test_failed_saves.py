"""A save that fails in the background process is not a failed process: the next one goes through the same."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from asyncdcp.errors import AsyncDCPError, Cancelled, CheckpointExists, StorageError, StorageFull
from asyncdcp.storage.faults import FaultyStorage
from asyncdcp.storage.spec import Fault
from tests.worker.conftest import LONG, SLAB, Opened, state, worker_of


def test_eio_fails_one_save(opened: Opened, tmp_path: Path) -> None:
    checkpointer = opened()
    pid = worker_of(checkpointer).pid
    for number, operation in enumerate(["open", "pwrite", "fsync", "ftruncate", "link", "fallocate", "mkdir"]):
        path = tmp_path / str(number)
        checkpointer.save(path, state(1)).result(LONG)
        target = path / "deeper" if operation == "mkdir" else path
        fault = Fault(operation, 1, "errno", errno.EIO)
        with pytest.raises(StorageError) as caught:
            checkpointer.save(FaultyStorage(target, [fault]), state(2), overwrite=True).result(LONG)
        assert caught.value.errno == errno.EIO
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.EIO
        assert torch.all(checkpointer.load(path).result(LONG)["w"] == 1)
    assert worker_of(checkpointer).pid == pid


def test_no_descriptor_left_to_share_the_arena_by_fails_one_save(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer, dup, left = opened(), os.dup, [errno.EMFILE]
    process = worker_of(checkpointer)

    def full_once(fd: int) -> int:
        if left:
            raise OSError(left.pop(), "Too many open files")
        return dup(fd)

    monkeypatch.setattr(os, "dup", full_once)
    with pytest.raises(AsyncDCPError, match=r"Too many open files; raise RLIMIT_NOFILE"):
        checkpointer.save(tmp_path / "1", state(1)).result(LONG)
    checkpointer.save(tmp_path / "2", state(2)).result(LONG)
    assert worker_of(checkpointer) is process


@contextmanager
def tmpfs(path: Path, options: str) -> Iterator[Callable[[str], object]]:
    """A tmpfs at ``path``; what is yielded mounts it anew with other options."""
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", path], capture_output=True, check=False)
    if made.returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield lambda more: subprocess.run(["mount", "-o", f"remount,{more}", path], check=True)
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_a_full_filesystem_fails_one_save(opened: Opened, tmp_path: Path) -> None:
    checkpointer = opened()
    with tmpfs(tmp_path / "full", f"size={5 * SLAB}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = worker_of(checkpointer).pid
        checkpointer.save(tmp_path / "full" / "1", state(1)).result(LONG)
        with pytest.raises(StorageFull) as caught:
            checkpointer.save(tmp_path / "full" / "2", state(2)).result(LONG)
        assert caught.value.errno == errno.ENOSPC
        assert torch.all(checkpointer.load(tmp_path / "full" / "1").result(LONG)["w"] == 1)
        assert not list((tmp_path / "full" / "2").glob("*.safetensors"))
        checkpointer.save(tmp_path / "elsewhere", state(3)).result(LONG)
        assert worker_of(checkpointer).pid == pid


def test_a_read_only_filesystem_fails_one_save(opened: Opened, tmp_path: Path) -> None:
    checkpointer = opened()
    with tmpfs(tmp_path / "ro", "size=64m") as remount, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        remount("ro")
        with pytest.raises(StorageError) as caught:
            checkpointer.save(tmp_path / "ro" / "1", state(1)).result(LONG)
        assert caught.value.errno == errno.EROFS
        remount("rw")
        checkpointer.save(tmp_path / "ro" / "1", state(2)).result(LONG)


def stopped(pid: int) -> Callable[[], object]:
    """Returns when the process is stopped; what is returned lets it go on."""
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    return partial(os.kill, pid, signal.SIGCONT)


def test_cancelled_while_writing(opened: Opened, tmp_path: Path) -> None:
    checkpointer = opened(staging_bytes=SLAB)
    handle = checkpointer.save(FaultyStorage(tmp_path, [Fault("pwrite", 2, "stop")]), state(1, slabs=12))
    later = checkpointer.save(tmp_path / "later", state(2))
    goes_on = stopped(worker_of(checkpointer).pid)
    handle.cancel()
    goes_on()
    with pytest.raises(Cancelled):
        handle.result(LONG)
    later.result(LONG)
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(CheckpointExists):
        checkpointer.save(tmp_path / "later", state(1)).result(LONG)


def test_one_that_waits_can_be_cancelled_while_another_writes(opened: Opened, tmp_path: Path) -> None:
    checkpointer = opened()
    storage = FaultyStorage(tmp_path / "slow", [Fault("fsync", 1, "stop")])
    slow, waiting = checkpointer.save(storage, state(1)), checkpointer.save(tmp_path / "waiting", state(1))
    waiting.staged.result(LONG)
    waiting.cancel()
    stopped(worker_of(checkpointer).pid)()
    with pytest.raises(Cancelled):
        waiting.result(LONG)
    slow.result(LONG)
    assert not (tmp_path / "waiting").exists()
