"""asyncdcp's own format, written by the drop-in with ``SerializationFormat.SAFETENSORS``."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlanner

from asyncdcp import SyncCheckpointer
from asyncdcp.errors import (
    CheckpointExists,
    CheckpointNotFound,
    CorruptCheckpoint,
    InvalidOption,
    StorageError,
    UnsupportedValue,
)
from asyncdcp.interop.dcp import FileSystemReader, FileSystemWriter
from asyncdcp.interop.dcp.own_commit import commit, standing
from asyncdcp.names import file_save_id, record_save_id
from asyncdcp.pipeline.reader import CheckpointReader
from asyncdcp.planning.save_plan import plan_save
from asyncdcp.storage import LocalStorage
from asyncdcp.storage.faults import FaultyOS
from asyncdcp.storage.spec import Fault
from tests.interop.dcp.states import State, blank, files, save_as_ranks, shard

Same = Callable[[Any, Any], bool]


def own(path: Path, **options: Any) -> FileSystemWriter:
    return FileSystemWriter(path, serialization_format="safetensors", **options)


@pytest.fixture
def checkpointer() -> Iterator[SyncCheckpointer]:
    with SyncCheckpointer(process=False) as made:
        yield made


def causes(caught: pytest.ExceptionInfo[CheckpointException]) -> list[BaseException]:
    return [error for error, _ in caught.value.failures.values()]


def test_all_of_a_state(tmp_path: Path, state: State, same: Same, checkpointer: SyncCheckpointer) -> None:
    dcp.save(state, storage_writer=own(tmp_path))
    target = blank(state)
    dcp.load(target, storage_reader=FileSystemReader(tmp_path))
    assert same(target, state)
    loaded = checkpointer.load(tmp_path)
    assert same(loaded, {**state, "model": dict(state["model"])})
    filled = blank({"model": state["model"], "big": state["big"]})
    checkpointer.load(tmp_path, filled, strict=False)
    assert same(filled, {"model": state["model"], "big": state["big"]})


def test_every_byte_has_a_checksum(tmp_path: Path, state: State, checkpointer: SyncCheckpointer) -> None:
    dcp.save(state, storage_writer=own(tmp_path))
    assert checkpointer.verify(tmp_path).ok
    (path,) = tmp_path.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert not checkpointer.verify(tmp_path).ok


def test_tensors_larger_than_a_file(
    tmp_path: Path, state: State, same: Same, checkpointer: SyncCheckpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncdcp.interop.dcp.own_writing.plan_save", partial(plan_save, file_limit=100_000))
    dcp.save(state, storage_writer=own(tmp_path))
    assert len([*tmp_path.glob("*.safetensors")]) > 10 and checkpointer.verify(tmp_path).ok
    assert same(checkpointer.load(tmp_path), state)


def test_several_ranks_with_shards_replicas_and_nothing(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    whole, bias = torch.randn(60, 1000), torch.randn(7)
    states = [
        {"w": shard(whole[30 * rank :][:30], (30 * rank, 0), whole.shape), "bias": bias, "step": 3} for rank in range(2)
    ]
    save_as_ranks(lambda: own(tmp_path), [*states, {"bias": bias, "step": 3}])
    assert len([name for name in files(tmp_path) if name.endswith(".index.json")]) == 3
    loaded = checkpointer.load(tmp_path)
    assert torch.equal(loaded["w"], whole) and torch.equal(loaded["bias"], bias) and loaded["step"] == 3
    columns = torch.zeros(60, 11)
    dcp.load({"w": shard(columns, (0, 500), whole.shape)}, storage_reader=FileSystemReader(tmp_path))
    assert torch.equal(columns, whole[:, 500:511])


def test_a_hole_is_not_committed(tmp_path: Path) -> None:
    class Unchecked(FileSystemWriter):
        """Loses what the second rank has written."""

        def finish(self, metadata: Any, results: Any) -> None:
            super().finish(metadata, [results[0], []])

    whole = torch.randn(60, 10)
    states = [{"w": shard(whole[30 * rank :][:30], (30 * rank, 0), whole.shape)} for rank in range(2)]
    with pytest.raises(CorruptCheckpoint, match=r"w: its chunks leave a hole in it"):
        save_as_ranks(lambda: Unchecked(tmp_path, serialization_format="safetensors"), states)
    assert [name[-5:] for name in files(tmp_path)] == [".part"], "what the coordinator did not hear of"
    save_as_ranks(lambda: own(tmp_path), states)
    assert len({file_save_id(name) for name in files(tmp_path)}) == 1 and len(files(tmp_path)) == 5


def test_cached_plans_save_anew(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    seen = []
    try:
        for step in range(3):
            state = {"x": torch.full((1000,), float(step)), "step": step}
            writer = own(tmp_path / str(step % 2), overwrite=step < 3)
            planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
            if step == 2:
                with pytest.warns(UserWarning, match="Detected an existing checkpoint"):
                    meta = dcp.save(state, storage_writer=writer, planner=planner)
            else:
                meta = dcp.save(state, storage_writer=writer, planner=planner)
            assert isinstance(meta, dcp.Metadata) and meta.storage_meta is not None
            seen.append(meta.storage_meta.save_id)
            loaded = checkpointer.load(tmp_path / str(step % 2))
            assert loaded["step"] == step and loaded["x"].eq(step).all()
    finally:
        for cache in (
            SavePlanner._cached_save_plan,
            SavePlanner._cached_all_plans,
            SavePlanner._cached_global_plan,
            SavePlanner._cached_metadata,
            SavePlanner._cached_final_save_plan,
        ):
            cache.clear()
    assert len(set(seen)) == 3
    assert {file_save_id(name) for name in files(tmp_path / "0")} == {seen[2]}


def test_async_save_on_a_thread(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    x = torch.full((1000,), 3.0)
    saved = dcp.async_save({"x": x}, storage_writer=own(tmp_path))
    x.fill_(-1)
    saved.result()  # type: ignore[union-attr]  # there is no stager of one's own
    assert checkpointer.load(tmp_path)["x"].eq(3).all()


def test_ranks_on_their_own(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    dcp.save({"x": torch.ones(3)}, storage_writer=own(tmp_path), use_collectives=False)
    target = {"x": torch.zeros(3)}
    dcp.load(target, storage_reader=FileSystemReader(tmp_path))
    assert target["x"].eq(1).all() and checkpointer.load(tmp_path / "__0")["x"].eq(1).all()


class Odd:
    """What takes allow_pickle."""


def test_what_is_not_plain_is_pickled(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    dcp.save({"odd": Odd(), "set": {1, 2}, "x": torch.ones(2)}, storage_writer=own(tmp_path))
    assert checkpointer.load(tmp_path, keys=["set", "x"])["set"] == {1, 2}
    with pytest.raises(UnsupportedValue, match="allow_pickle=True"):
        checkpointer.load(tmp_path)
    assert isinstance(checkpointer.load(tmp_path, allow_pickle=True)["odd"], Odd)


class Raw(dcp.DefaultSavePlanner):
    def resolve_data(self, write_item: Any) -> Any:
        data = super().resolve_data(write_item)
        return data[:1] if isinstance(data, torch.Tensor) else type(data)(b"raw")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_planners_that_give_something_else(tmp_path: Path) -> None:
    for state, message in (
        ({"n": 1}, "are not torch.save's"),
        ({"x": torch.ones(3)}, r"gives torch.float32\[1\] for x"),
        ({"q": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)}, "q has dtype torch.qint8"),
    ):
        with pytest.raises(CheckpointException, match=message) as caught:
            dcp.save(state, storage_writer=own(tmp_path), planner=Raw())
        assert isinstance(causes(caught)[0], UnsupportedValue) and not files(tmp_path)


def test_a_place_holds_one_format(tmp_path: Path) -> None:
    state = {"x": torch.ones(3)}
    dcp.save(state, storage_writer=own(tmp_path / "own"))
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path / "torch"))
    for writer in (FileSystemWriter(tmp_path / "own"), own(tmp_path / "torch")):
        with pytest.raises(CheckpointException, match="holds a checkpoint of another format") as caught:
            dcp.save(state, storage_writer=writer)
        assert isinstance(causes(caught)[0], CheckpointExists)
    with pytest.raises(CheckpointException, match=r"Checkpoint already exists"):
        dcp.save(state, storage_writer=own(tmp_path / "own", overwrite=False))


def test_options(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="serialization_format is json"):
        FileSystemWriter(tmp_path, serialization_format="json")
    with pytest.raises(InvalidOption, match="_extensions transform torch's files"):
        own(tmp_path, _extensions=[object()])


class Faulty(FileSystemWriter):
    """A writer whose operating system fails, from some call on."""

    system: FaultyOS

    def _storage(self) -> LocalStorage:
        return LocalStorage(self.path, posix=self.system)


@pytest.mark.parametrize(
    ("operation", "number"),
    [("open", 1), ("pwrite", 1), ("ftruncate", 1), ("fsync", 1), ("fsync", 2), ("fsync", 3), ("link", 1), ("link", 2)],
)
def test_a_system_that_fails(
    tmp_path: Path, operation: str, number: int, checkpointer: SyncCheckpointer, recwarn: pytest.WarningsRecorder
) -> None:
    dcp.save({"x": torch.ones(1000)}, storage_writer=own(tmp_path))
    before = files(tmp_path)
    writer = Faulty(tmp_path, serialization_format="safetensors")
    writer.system = FaultyOS([Fault(operation, number, "errno", errno.EIO)])
    with pytest.raises(CheckpointException) as caught:
        dcp.save({"x": torch.zeros(1000)}, storage_writer=writer)
    assert isinstance(causes(caught)[0], StorageError) and writer.system.calls[operation] >= number
    left = files(tmp_path) - before
    assert before <= files(tmp_path) and all(record_save_id(name) for name in left), "at most the Record of an abort"
    assert checkpointer.load(tmp_path)["x"].eq(1).all()
    dcp.save({"x": torch.zeros(1000)}, storage_writer=own(tmp_path))
    assert checkpointer.load(tmp_path)["x"].eq(0).all() and not before & files(tmp_path)


def test_a_rename_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointer: SyncCheckpointer) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr("asyncdcp.interop.dcp.own_commit.os.rename", refuse)
    with pytest.raises(CheckpointException, match="read-only"):
        dcp.save({"x": torch.ones(3)}, storage_writer=own(tmp_path))
    assert not files(tmp_path)
    with pytest.raises(CheckpointNotFound):
        checkpointer.load(tmp_path)


class Captured(FileSystemWriter):
    """Leaves ``finish`` to the test."""

    finished: Any

    def finish(self, metadata: Any, results: Any) -> None:
        self.finished = metadata, results


class Late(LocalStorage):
    """Is cancelled when the Record has been claimed, or dies when it is to be."""

    scope: anyio.CancelScope | None = None

    async def claim(self, name: str, data: bytes) -> bool:
        if self.scope is None:
            raise StorageError("gone")
        won = await super().claim(name, data)
        self.scope.cancel()
        return won

    async def delete(self, names: Any) -> None:
        if self.scope is not None:
            await super().delete(names)


async def test_a_cancellation_is_too_late_for_a_commit(tmp_path: Path) -> None:
    writer = Captured(tmp_path, serialization_format="safetensors")
    dcp.save({"x": torch.ones(3)}, storage_writer=writer)
    storage = Late(tmp_path)
    with anyio.CancelScope() as storage.scope:
        await commit(storage, *writer.finished, overwrite=True)
    async with await CheckpointReader.open(LocalStorage(tmp_path)) as reader:
        assert list(reader.metadata.state_dict_metadata) == ["x"]
    assert len(await storage.list()) == 3


async def test_a_coordinator_that_dies(tmp_path: Path) -> None:
    """What it leaves is no checkpoint; the next save makes sure that it never will be, and removes it."""
    writer = Captured(tmp_path, serialization_format="safetensors")
    dcp.save({"x": torch.ones(3)}, storage_writer=writer)
    with pytest.raises(StorageError, match="gone"):
        await commit(Late(tmp_path), *writer.finished, overwrite=True)
    left = await LocalStorage(tmp_path).list()
    dead = {file_save_id(name) for name in left} - {None}
    assert len(left) == 3 and len(dead) == 1 and not await standing(LocalStorage(tmp_path))
    meta = dcp.save({"x": torch.zeros(3)}, storage_writer=own(tmp_path))
    assert isinstance(meta, dcp.Metadata) and meta.storage_meta is not None
    now = await LocalStorage(tmp_path).list()
    assert {name for name in now if file_save_id(name) in dead} == {f"{name}.json" for name in dead}
    assert len([name for name in now if file_save_id(name) == meta.storage_meta.save_id]) == 3 and len(now) == 4
