"""What a conversion leaves, keeps and compares beside its tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncdcp.interop.convert as module
from asyncdcp import SyncCheckpointer
from asyncdcp.errors import CorruptCheckpoint, StorageError
from asyncdcp.interop import streaming
from asyncdcp.interop.convert import Changes, Format, convert
from asyncdcp.interop.selection import select
from asyncdcp.storage.local_writer import LocalWriter
from tests.work import open_descriptors

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")


def source(path: Path, state: dict[str, Any] | None = None) -> Path:
    with SyncCheckpointer(process=False) as checkpointer:
        checkpointer.save(path, {"w": torch.arange(6.0), "step": 3} if state is None else state)
    return path


@pytest.mark.parametrize("to", ["native", "dcp", "torch"])
async def test_a_value_that_is_written_otherwise_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Format
) -> None:
    place, calls = source(tmp_path / "source"), 0

    def other(metadata: Any, keys: Sequence[str] | None, rename: Any, dtype: str | None) -> Any:
        nonlocal calls
        calls += 1
        selection = select(metadata, keys, rename, dtype)
        if calls == 2:  # what was written is read
            selection.values["step"] = 4
        return selection

    monkeypatch.setattr(module, "select", other)
    with pytest.raises(CorruptCheckpoint, match="target does not hold what was written to it: step"):
        await convert(place, tmp_path / "target", to)
    assert os.listdir(tmp_path) == ["source"]


async def test_a_value_that_only_unpickling_would_show_is_taken(tmp_path: Path) -> None:
    place = source(tmp_path / "source", {"w": torch.ones(2), "folder": Path("data")})
    await convert(place, tmp_path / "target", "dcp", Changes(allow_pickle=True))
    with SyncCheckpointer(process=False) as checkpointer:
        assert checkpointer.load(tmp_path / "target", allow_pickle=True)["folder"] == Path("data")


@pytest.mark.parametrize("to", ["native", "dcp", "torch"])
async def test_tensors_in_a_tuple(tmp_path: Path, to: Format) -> None:
    pair = (torch.arange(3), {"inner": torch.ones(2)}, torch.Size([2]))
    place = source(tmp_path / "source", {"pair": pair, "w": torch.zeros(4)})
    await convert(place, tmp_path / "target", to)
    with SyncCheckpointer(process=False) as checkpointer:
        found = checkpointer.load(tmp_path / "target")
    assert isinstance(found["pair"], tuple) and isinstance(found["pair"][2], torch.Size)
    torch.testing.assert_close(found["pair"], pair, rtol=0, atol=0)


async def test_no_folder_is_left_of_a_native_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(plan: Any, slab: Any, held: Any, into: memoryview) -> None:
        into[:] = b"\1" * len(into)

    place = source(tmp_path / "source")
    monkeypatch.setattr(streaming, "_fill", flip)
    with pytest.raises(CorruptCheckpoint):
        await convert(place, tmp_path / "new" / "a" / "b")
    assert os.listdir(tmp_path) == ["source"]


async def test_each_shard_is_finished_before_many_others_are_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = source(tmp_path / "source", {f"w{number}": torch.full((4,), number) for number in range(40)})
    before, most, finish = len(os.listdir("/proc/self/fd")), 0, LocalWriter.finish

    async def counted(writer: LocalWriter, length: int) -> None:
        nonlocal most
        most = max(most, len(os.listdir("/proc/self/fd")) - before)
        await finish(writer, length)

    monkeypatch.setattr(LocalWriter, "finish", counted)
    await convert(place, tmp_path / "target", "hf", Changes(shard_bytes=1))
    assert len(list((tmp_path / "target").glob("*.safetensors"))) == 40
    assert most < 20


async def test_every_shard_is_closed_where_one_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = source(tmp_path / "source", {f"w{number}": torch.full((4,), number) for number in range(3)})
    abort, aborted = LocalWriter.abort, list[LocalWriter]()

    async def full(writer: LocalWriter, offset: int, buffer: Any) -> None:
        raise StorageError("the disk is gone", path="target")

    async def stuck(writer: LocalWriter) -> None:
        aborted.append(writer)
        await abort(writer)
        raise StorageError("it cannot be removed", path="target")

    monkeypatch.setattr(LocalWriter, "write", full)
    monkeypatch.setattr(LocalWriter, "abort", stuck)
    before = open_descriptors()
    with pytest.raises(StorageError):
        await convert(place, tmp_path / "target", "hf", Changes(shard_bytes=1))
    assert len(aborted) > 1 and open_descriptors() <= before
    assert os.listdir(tmp_path) == ["source"]
