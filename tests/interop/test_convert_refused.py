"""Conversions that are refused, fail or are cancelled, and what is left then: nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import pytest
import torch
from torch import Tensor

from asyncdcp import SyncCheckpointer
from asyncdcp.errors import (
    CheckpointExists,
    CheckpointNotFound,
    CorruptCheckpoint,
    InvalidOption,
    StorageError,
    StorageFull,
    UnsupportedFormat,
    UsageError,
)
from asyncdcp.interop import convert as module
from asyncdcp.interop import dcp_target, streaming, torch_file
from asyncdcp.interop.convert import Changes, Format, convert
from asyncdcp.storage import LocalStorage
from tests.interop.conversions import FORMS, everything, write_source

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"keys": ["nothing"]}, InvalidOption, "match nothing"),
        ({"keys": ["*", "nothing"]}, InvalidOption, "keys nothing match nothing"),
        ({"rename": {"mode": "x"}}, InvalidOption, "nothing is called 'mode'"),
        ({"rename": {"epoch": "lr"}}, InvalidOption, "'epoch' and 'lr' the same name 'lr'"),
        ({"rename": {"mask": ""}}, InvalidOption, "leaves 'mask' without a name"),
        ({"dtype": "int8"}, InvalidOption, "dtype takes one of"),
        ({"rename": str.upper}, InvalidOption, "rename takes a mapping of names"),
        ({"rename": {"mask": None}}, InvalidOption, "rename takes a mapping of names"),
        ({"shard_bytes": 1.5}, InvalidOption, "shard_bytes takes a whole number"),
    ],
)
async def test_wrong_changes(tmp_path: Path, changes: dict[str, Any], error: type[Exception], said: str) -> None:
    source = write_source("native", tmp_path / "source")
    with pytest.raises(error, match=said):
        await convert(source, tmp_path / "target", "torch", Changes(**changes))
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("to", FORMS)
async def test_what_is_there_is_left_alone(tmp_path: Path, to: Format) -> None:
    source = write_source("native", tmp_path / "source")
    await convert(source, tmp_path / "target", to)
    before = everything(tmp_path)
    with pytest.raises(CheckpointExists):
        await convert(source, tmp_path / "target", to)
    assert everything(tmp_path) == before
    with pytest.raises(CheckpointNotFound):
        await convert(tmp_path / "nowhere", tmp_path / "other", to)


@pytest.mark.parametrize("to", ["dcp", "hf", "torch"])
async def test_what_has_come_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Format
) -> None:
    source, target, compare = write_source("native", tmp_path / "source"), tmp_path / "target", module._compare

    async def late(*args: Any) -> None:
        await compare(*args)
        target.write_bytes(b"another's")

    monkeypatch.setattr(module, "_compare", late)
    with pytest.raises(CheckpointExists, match=f"{target} exists"):
        await convert(source, target, to)
    assert sorted(os.listdir(tmp_path)) == ["source", "target"] and target.read_bytes() == b"another's"


async def test_wrong_words(tmp_path: Path) -> None:
    source = write_source("native", tmp_path / "source")
    with pytest.raises(InvalidOption, match="to takes one of"):
        await convert(source, tmp_path / "target", "onnx")  # type: ignore[arg-type]  # what the test is about
    with pytest.raises(UsageError, match="is no directory"):
        await convert(source, tmp_path / "no" / "target", "torch")
    with pytest.raises(InvalidOption, match="sequence of patterns"):
        Changes(keys="model.*")
    with SyncCheckpointer(process=False) as checkpointer:
        checkpointer.save(tmp_path / "odd", {"c": torch.ones(2, dtype=torch.complex64), "v": {1, 2}})
    with pytest.raises(UnsupportedFormat, match="c has dtype complex64"):
        await convert(tmp_path / "odd", tmp_path / "target", "hf")
    with pytest.raises(InvalidOption, match="no tensor to write"):
        await convert(tmp_path / "odd", tmp_path / "target", "hf", Changes(keys=["v"]))
    assert sorted(os.listdir(tmp_path)) == ["odd", "source"]


async def test_a_torch_file_has_its_place_before_it_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, size = write_source("native", tmp_path / "source"), [0]

    def full(fd: int, offset: int, length: int) -> None:
        size[0] = length
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(StorageFull, match=f"cannot write {tmp_path}/target: No space left"):
            await convert(source, tmp_path / "target", "torch")
    assert os.listdir(tmp_path) == ["source"]
    await convert(source, tmp_path / "target", "torch")
    assert size == [(tmp_path / "target").stat().st_size]


@pytest.mark.parametrize("to", FORMS)
async def test_damage_of_the_source_leaves_nothing(tmp_path: Path, to: Format) -> None:
    source = write_source("native", tmp_path / "source")
    (data,) = source.glob("*.safetensors")
    content = bytearray(data.read_bytes())
    content[9000] ^= 1
    data.write_bytes(content)
    with pytest.raises(CorruptCheckpoint):
        await convert(source, tmp_path / "target", to)
    assert os.listdir(tmp_path) == ["source"]


async def test_a_native_one_that_is_cancelled_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write_source("native", tmp_path / "source"), tmp_path / "target"
    target.mkdir()  # and it stays

    with anyio.CancelScope() as scope:
        monkeypatch.setattr(streaming, "_fill", lambda *_: anyio.from_thread.run_sync(scope.cancel))
        await convert(source, target)
    assert scope.cancelled_caught and os.listdir(target) == []


@pytest.mark.parametrize("by", ["scope", "task"])
async def test_a_native_one_that_is_cancelled_late_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    source, barrier = write_source("native", tmp_path / "source"), LocalStorage.barrier
    found: list[int] = []

    async def late(storage: LocalStorage) -> None:
        if not found:
            found.append(len(await storage.list()))
            if by == "scope":
                scope.cancel()
            else:
                task.cancel()
        await barrier(storage)

    monkeypatch.setattr(LocalStorage, "barrier", late)
    with anyio.CancelScope() as scope:
        if by == "task":
            task = asyncio.ensure_future(convert(source, tmp_path / "target"))
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await convert(source, tmp_path / "target")
    assert found == [2] and os.listdir(tmp_path) == ["source"]  # data and Index were there, and no Record


@pytest.mark.parametrize("by", ["scope", "task"])
async def test_a_dcp_one_that_is_cancelled_waits_for_no_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    source, reading, ended = write_source("native", tmp_path / "source"), anyio.Event(), anyio.Event()

    async def stuck(*_: Any) -> None:
        reading.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    monkeypatch.setattr(dcp_target, "read_tensors", stuck)
    with anyio.fail_after(20):
        if by == "scope":
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(convert, source, tmp_path / "target", "dcp")
                await reading.wait()
                tasks.cancel_scope.cancel()
        else:
            task = asyncio.ensure_future(convert(source, tmp_path / "target", "dcp"))
            await reading.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    assert ended.is_set() and os.listdir(tmp_path) == ["source"]


async def test_a_torch_one_that_is_cancelled_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, skeleton = write_source("native", tmp_path / "source"), torch_file._skeleton
    loop, ended = asyncio.get_running_loop(), threading.Event()

    def late(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        loop.call_soon_threadsafe(task.cancel)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()  # the task has heard of it
        try:
            return skeleton(*args, **kwargs)
        finally:
            ended.set()

    monkeypatch.setattr(torch_file, "_skeleton", late)
    task = asyncio.ensure_future(convert(source, tmp_path / "target", "torch"))
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(ended.wait)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("to", ["native", "hf"])
async def test_what_is_written_wrongly_is_found_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Format
) -> None:
    source = write_source("native", tmp_path / "source")
    real = streaming._fill

    def flip(plan: Any, slab: Any, held: Any, into: memoryview) -> None:
        real(plan, slab, held, into)
        into[5000] ^= 1

    monkeypatch.setattr(streaming, "_fill", flip)
    with pytest.raises(CorruptCheckpoint, match=f"{tmp_path}/target does not hold what was written to it: model"):
        await convert(source, tmp_path / "target", to)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("to", ["dcp", "torch"])
async def test_what_is_read_back_otherwise_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Format
) -> None:
    source = write_source("native", tmp_path / "source")
    compare = module._compare

    async def changed(reader: Any, selection: Any, written: dict[str, bytes], path: str) -> None:
        (name, *_) = written
        await compare(reader, selection, {**written, name: b"another"}, path)

    monkeypatch.setattr(module, "_compare", changed)
    with pytest.raises(CorruptCheckpoint, match=f"{tmp_path}/target does not hold what was written to it: "):
        await convert(source, tmp_path / "target", to)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("to", ["hf", "torch", "dcp"])
async def test_what_cannot_be_written_is_named_as_the_user_does(tmp_path: Path, to: Format) -> None:
    source, target = write_source("native", tmp_path / "source"), tmp_path / ("x" * 245)
    with pytest.raises(StorageError, match="File name too long") as caught:
        await convert(source, target, to)
    assert str(caught.value).count(str(target)) and ".partial" not in f"{caught.value} {caught.value.path}"
    assert os.listdir(tmp_path) == ["source"]
