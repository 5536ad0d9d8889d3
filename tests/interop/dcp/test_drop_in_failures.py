"""Saves that fail, at every stage: the error is raised, nothing is left, and what was there before is still there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from asyncdcp.errors import CorruptCheckpoint, InvalidOption, StorageError, StorageFull
from asyncdcp.interop.dcp import FileSystemReader, FileSystemWriter
from asyncdcp.interop.dcp.metadata_file import publish, remove_unnamed
from asyncdcp.storage import LocalStorage
from asyncdcp.storage.faults import FaultyOS
from asyncdcp.storage.spec import Fault
from tests.interop.dcp.states import State, files, save_as_ranks, shard

WAYS: list[dict[str, Any]] = [{}, {"thread_count": 2, "single_file_per_rank": False}]


def old() -> State:
    return {"x": torch.full((1000, 1000), 1.0), "y": torch.ones(10), "n": 1}


def new() -> State:
    return {"x": torch.full((1000, 1000), 2.0), "y": torch.zeros(10), "n": 2}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """With a checkpoint in it."""
    dcp.save(old(), storage_writer=FileSystemWriter(tmp_path / "place"))
    return tmp_path / "place"


def check_holds(place: Path, number: int) -> None:
    for reader in (FileSystemReader, dcp.FileSystemReader):
        target: State = {"x": torch.zeros(1000, 1000), "n": 0}
        dcp.load(target, storage_reader=reader(place))
        assert target["n"] == number and target["x"].eq(number).all()


@contextmanager
def overwriting() -> Iterator[None]:
    with pytest.warns(UserWarning, match="Detected an existing checkpoint"):
        yield


class Faulty(FileSystemWriter):
    """A writer whose operating system fails once."""

    fault = Fault("pwrite", 1, "errno", errno.EIO)
    counter = FaultyOS([])

    def _storage(self) -> LocalStorage:
        self.counter = FaultyOS([self.fault])
        return LocalStorage(self.path, posix=self.counter)


def test_overwriting_leaves_only_the_new_one(place: Path) -> None:
    before = files(place)
    with overwriting():
        dcp.save(new(), storage_writer=FileSystemWriter(place))
    check_holds(place, 2)
    assert len(files(place)) == 2 and not files(place) - {".metadata"} & before
    with overwriting():
        dcp.save(old(), storage_writer=dcp.FileSystemWriter(place))  # torch's, which knows nothing of it
    check_holds(place, 1)


def test_what_is_not_to_be_overwritten_is_not(place: Path) -> None:
    with pytest.raises(CheckpointException, match=r"Checkpoint already exists and self.overwrite=False"):
        dcp.save(new(), storage_writer=FileSystemWriter(place, overwrite=False))
    check_holds(place, 1)
    alone = place / "alone"
    dcp.save(new(), storage_writer=FileSystemWriter(alone), use_collectives=False)
    with pytest.raises(RuntimeError, match=r"Checkpoint already exists"):
        dcp.save(new(), storage_writer=FileSystemWriter(alone, overwrite=False), use_collectives=False)


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize(
    ("operation", "number", "code"),
    [
        ("open", 1, errno.EACCES),
        ("open", 2, errno.EMFILE),
        ("fallocate", 1, errno.ENOSPC),
        ("pwrite", 1, errno.EIO),
        ("ftruncate", 1, errno.EIO),
        ("fsync", 1, errno.EIO),
        ("fsync", 2, errno.EDQUOT),
        ("close", 1, errno.EIO),
    ],
)
def test_a_system_that_fails(place: Path, options: dict[str, Any], operation: str, number: int, code: int) -> None:
    before = files(place)
    writer = Faulty(place, **options)
    writer.fault = Fault(operation, number, "errno", code)
    with overwriting(), pytest.raises(CheckpointException) as caught:
        dcp.save(new(), storage_writer=writer)
    (error, _), *_ = caught.value.failures.values()
    expected = StorageFull if code in (errno.ENOSPC, errno.EDQUOT) else StorageError
    assert isinstance(error, expected) and error.errno == code
    assert writer.counter.calls[operation] >= number
    assert files(place) == before
    check_holds(place, 1)
    with overwriting():
        dcp.save(new(), storage_writer=FileSystemWriter(place, **options))
    check_holds(place, 2)


class Boom(Exception):
    pass


class Planner(dcp.DefaultSavePlanner):
    """Fails at the name ``y``."""

    def resolve_data(self, write_item: Any) -> Any:
        if write_item.index.fqn == "y":
            raise Boom("no y")
        return super().resolve_data(write_item)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_planner_that_fails(place: Path, options: dict[str, Any]) -> None:
    before = files(place)
    with overwriting(), pytest.raises(CheckpointException, match="no y"):
        dcp.save(new(), storage_writer=FileSystemWriter(place, **options), planner=Planner())
    assert files(place) == before
    check_holds(place, 1)


def test_a_publication_that_fails(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with overwriting(), pytest.raises(CheckpointException, match="read-only"):
            dcp.save(new(), storage_writer=FileSystemWriter(place))
    check_holds(place, 1)
    assert not any(name.endswith(".tmp") for name in files(place))
    with overwriting():
        dcp.save(new(), storage_writer=FileSystemWriter(place))
    check_holds(place, 2)
    assert len(files(place)) == 2, "what the failed save had written is gone"


def test_a_rank_that_fails_takes_only_its_own_files_along(tmp_path: Path) -> None:
    whole = torch.randn(60, 100)
    states = [{"w": shard(whole[30 * rank :][:30], (30 * rank, 0), whole.shape)} for rank in range(2)]
    writers: Iterator[Callable[[Path], FileSystemWriter]] = iter([FileSystemWriter, Faulty])
    with pytest.raises(StorageError):
        save_as_ranks(lambda: next(writers)(tmp_path), states)
    assert files(tmp_path) == {"__0_0.distcp"}
    save_as_ranks(lambda: FileSystemWriter(tmp_path), states)
    assert len(files(tmp_path)) == 3 and "__0_0.distcp" not in files(tmp_path)


def test_files_of_ranks_on_their_own_are_left_alone(tmp_path: Path) -> None:
    for rank in range(2):
        writer = FileSystemWriter(tmp_path)
        planner = dcp.DefaultSavePlanner()
        planner.set_up_planner({"x": torch.full((3,), float(rank))}, writer.storage_meta(), True)
        writer.set_up_storage_writer(True, rank=rank, use_collectives=False)
        plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
        results = writer.write_data(planner.finish_plan(writer.prepare_global_plan(plans)[0]), planner).value()
        writer.finish(metadata, [results])
    dcp.save({"x": torch.ones(3)}, storage_writer=FileSystemWriter(tmp_path))
    assert {"__0.metadata", "__1.metadata", "__0_0.distcp", "__1_0.distcp", ".metadata"} < files(tmp_path)


def test_where_it_cannot_be_told_nothing_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    (tmp_path / "__0.metadata").write_bytes(b"x")
    remove_unnamed(tmp_path / ".metadata", "__", set())
    assert files(tmp_path) == {"__0_0.distcp", "__0.metadata"} and "could not be removed" in caplog.text


@pytest.mark.parametrize("sync", [True, False])
def test_what_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    dcp.save(old(), storage_writer=FileSystemWriter(tmp_path / "a" / "b", sync_files=sync))
    if not sync:
        assert synced == []
        return
    assert synced[:4] == ["a/b/__0_0.distcp", "a/b", "a", "."], "bytes, then names, then the directories' own"
    assert synced[-2].startswith("a/b/..metadata.") and synced[-1] == "a/b"


def test_publishing_makes_the_directory_durable_where_nothing_else_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    publish(tmp_path / "a" / "b" / ".metadata", b"x", sync=True)
    assert synced[1:] == [str(tmp_path / "a" / "b"), str(tmp_path / "a"), str(tmp_path)]


def test_reads_that_fail_name_the_file(place: Path) -> None:
    target: State = {"x": torch.zeros(1000, 1000)}
    data = (place / "__0_0.distcp").read_bytes()
    (place / "__0_0.distcp").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointException) as caught:
        dcp.load(target, storage_reader=FileSystemReader(place))
    (error, _), *_ = caught.value.failures.values()
    assert isinstance(error, CorruptCheckpoint)
    (place / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointException, match=r"asks for os.system"):
        dcp.load(target, storage_reader=FileSystemReader(place))


def test_a_url_is_no_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for made in (FileSystemWriter, FileSystemReader):
        with pytest.raises(InvalidOption, match=r"'s3://bucket/x'; .*AsyncCheckpointer and .* take URLs"):
            made("s3://bucket/x")
    with pytest.raises(InvalidOption, match="take a folder"):
        dcp.save(new(), storage_writer=FileSystemWriter("x"), checkpoint_id="s3://bucket/x")
    assert not list(tmp_path.iterdir())
