"""Saves that are skipped, refused or repeated: for another that is under way, for what is there, for what is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from asyncdcp import AsyncCheckpointer, MemoryStorage
from asyncdcp.errors import (
    AsyncDCPError,
    CheckpointerBusy,
    CheckpointExists,
    InvalidOption,
    SaveSkipped,
    StateMismatch,
    UnseenFailure,
    UnsupportedValue,
)
from asyncdcp.names import make_save_id
from asyncdcp.pipeline.records import read_records
from tests.checkpointer.conftest import Opened, save_ids


def test_when_busy_skip_and_error(opened: Opened, faulty: Any, tmp_path: Path) -> None:
    for when_busy in ("skip", "error"):
        storage = faulty()
        gate = storage.gate("write")
        checkpointer = opened(when_busy=when_busy)
        first = checkpointer.save(storage, {"w": torch.ones(1)})
        gate.wait_begun()
        target = tmp_path / when_busy
        if when_busy == "skip":
            skipped = checkpointer.save(target, {"w": torch.ones(1)})
            for future in skipped:
                with pytest.raises(SaveSkipped, match="skip"):
                    future.result()
        else:
            with pytest.raises(CheckpointerBusy, match="error"):
                checkpointer.save(target, {"w": torch.ones(1)})
        assert not target.exists()
        gate.release.set()
        assert first.result().tensors == 1
        save_id = checkpointer.save(target, {"w": torch.ones(1)}).result().save_id
        assert save_id == make_save_id(checkpointer._planner.run_id, str(target), 2)


def test_a_skipped_save_is_no_unseen_failure(opened: Opened, faulty: Any) -> None:
    checkpointer = opened(when_busy="skip")
    storage = faulty()
    gate = storage.gate("write")
    checkpointer.save(storage, {"w": torch.ones(1)})
    checkpointer.save(MemoryStorage(), {"w": torch.ones(1)})
    gate.release.set()
    checkpointer.close()


def test_every_call_counts_as_an_attempt(checkpointer: AsyncCheckpointer, faulty: Any, tmp_path: Path) -> None:
    target = tmp_path / "it"
    with pytest.raises(UnsupportedValue):
        checkpointer.save(target, {"w": object()})
    with pytest.raises(InvalidOption):
        checkpointer.save(target, {"w": torch.ones(1)}, metadata={"x": object()})
    failing = faulty()
    failing.errors["list", 1] = OSError("no")
    failed = checkpointer.save(failing, {})
    while not failed.done():
        failed.committed.wait(1)
    with pytest.raises(UnseenFailure):
        checkpointer.save(target, {"w": torch.ones(1)})
    handle = checkpointer.save(target, {"w": torch.ones(1)})
    assert handle.result().save_id == make_save_id(checkpointer._planner.run_id, str(target), 4)


def test_an_existing_checkpoint_is_refused_without_a_trace(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
    target = tmp_path / "it"
    checkpointer.save(target, {"w": torch.ones(1)}).result()
    before = sorted(path.name for path in target.iterdir())
    handle = checkpointer.save(target, {"w": torch.zeros(1)})
    with pytest.raises(CheckpointExists, match="overwrite=True"):
        handle.result()
    assert sorted(path.name for path in target.iterdir()) == before
    assert checkpointer.load(target).result()["w"] == 1
    assert handle.staged.done()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_checkpoint_of_dcp_is_neither_hidden_nor_replaced(
    checkpointer: AsyncCheckpointer, tmp_path: Path, *, overwrite: bool
) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"DCP's")
    with pytest.raises(CheckpointExists, match=r"of torch\.distributed\.checkpoint .* at .*; save to another path"):
        checkpointer.save(tmp_path, {"w": torch.zeros(1)}, overwrite=overwrite).result()
    assert [path.name for path in tmp_path.iterdir()] == ["__0_0.distcp"]


def test_overwriting_replaces_and_deletes(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
    target = tmp_path / "it"
    first = checkpointer.save(target, {"w": torch.ones(1)}).result()
    second = checkpointer.save(target, {"w": torch.zeros(1)}, overwrite=True).result()
    assert second.replaced == (first.save_id,)
    assert save_ids(target) == {second.save_id}
    assert all(path.name.startswith(second.save_id) for path in target.iterdir())
    assert checkpointer.load(target).result()["w"] == 0


async def test_metadata_is_kept_as_json(checkpointer: AsyncCheckpointer) -> None:
    storage = MemoryStorage()
    given: dict[str, Any] = {"loss": 0.5, "tags": ["a"], "nested": {"n": None}}
    handle = checkpointer.save(storage, {}, metadata=given)
    given["tags"].append("b")
    await handle
    [record] = await read_records(storage, await storage.list())
    assert record.metadata == {"loss": 0.5, "tags": ["a"], "nested": {"n": None}}


def test_metadata_that_could_not_be_read_again_is_refused(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    checkpointer.save(tmp_path, {"w": torch.ones(1)}).result()
    for given, words in (({"log": "x" * (65 << 20)}, "hold what is large in the state"), ({"x": deep}, "100 levels")):
        with pytest.raises(InvalidOption, match=words):
            checkpointer.save(tmp_path, {"w": torch.zeros(1)}, metadata=given, overwrite=True)
    assert checkpointer.load(tmp_path).result()["w"] == 1
    checkpointer.save(tmp_path, {}, metadata={"x": deep[0][0]}, overwrite=True).result()


def test_what_cannot_be_saved_is_refused_at_once(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
    for place in ("", 3, "nowhere://bucket"):
        with pytest.raises(InvalidOption):
            checkpointer.save(place, {})  # type: ignore[arg-type]  # on purpose
    with pytest.raises(UnsupportedValue):
        checkpointer.save(tmp_path / "it", {"w": torch.ones(1, device="meta")})
    assert not (tmp_path / "it").exists()


def test_what_a_load_cannot_go_by_is_refused(checkpointer: AsyncCheckpointer) -> None:
    storage = MemoryStorage()
    checkpointer.save(storage, {"w": torch.ones(1)}).result()
    with pytest.raises(InvalidOption, match="rename takes a mapping"):
        checkpointer.load(storage, {"w": torch.ones(1)}, rename="w")  # type: ignore[call-overload]  # on purpose
    with pytest.raises(StateMismatch, match=r"model\.\*: keys that match nothing in the checkpoint"):
        checkpointer.load(storage, keys=["model.*"]).result()


def test_a_failure_that_is_nobodys_names_the_save(
    checkpointer: AsyncCheckpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("asyncdcp.arena.os.ftruncate", broken)
    with pytest.raises(AsyncDCPError, match=f"the save to {tmp_path}/it failed: OSError: .*Input/output error"):
        checkpointer.save(tmp_path / "it", {"w": torch.ones(1)}).result()
