"""The writer over storages that fail or hang on purpose: how each save ends, what is raised, what is left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import msgspec
import numpy as np
import pytest
import safetensors

from asyncdcp.errors import AsyncDCPError, Cancelled, DeadlineExceeded, StorageError, UnsupportedValue
from asyncdcp.names import data_name, index_name, record_name
from asyncdcp.pipeline import settle, transform
from asyncdcp.pipeline.commit import CommitMachine
from asyncdcp.pipeline.messages import SlabReady
from asyncdcp.pipeline.settle import Reason
from asyncdcp.runs.history import stage_times
from asyncdcp.storage import LocalStorage, MemoryStorage
from tests.pipeline.forge import OTHER, SAVE, SLAB, Arrays, read_all, save, writer_of
from tests.pipeline.staged import ARRAYS, Staged, fails, is_waited_for, nothing_is_left, record_in
from tests.work import LONG, leap


async def test_a_save_is_a_checkpoint_and_safetensors() -> None:
    storage = Staged()
    run, slabs = writer_of(storage, ARRAYS)
    saved = await run.run()
    assert sorted(slabs.given_back) == list(range(6)) and saved.replaced == []
    assert storage.calls[-5:] == ["put_done", "barrier", "list", "claim_commit", "claimed"]
    loaded = await read_all(storage)
    assert all(np.array_equal(loaded[name], ARRAYS[name]) for name in ARRAYS)
    data = storage._objects[data_name(SAVE, 0, 0)]
    assert len(data) == saved.stored_bytes == stage_times(run._trace.spans)["write"].bytes
    assert {name for name, _ in safetensors.deserialize(data)} == set(ARRAYS)
    assert storage.calls.index("barrier") > storage.calls.index("finish")
    record = record_in(storage)
    assert record and record.summary and record.summary.tensors == 2 and record.summary.stored_bytes == len(data)


async def test_slabs_may_come_in_any_order_and_in_several_files() -> None:
    storage = Staged()
    arrays: Arrays = {**ARRAYS, "x": np.arange(9000.0)}
    run, slabs = writer_of(storage, arrays, file_limit=40_000)
    slabs.ready.reverse()
    await run.run()
    assert storage.calls.count("create") == storage.calls.count("finish") > 3
    loaded = await read_all(storage)
    assert all(np.array_equal(loaded[name], arrays[name]) for name in arrays)


async def test_a_state_without_tensors() -> None:
    storage = Staged()
    await save(storage, {})
    assert set(storage._objects) == {index_name(SAVE, 0), record_name(SAVE)}
    assert await read_all(storage) == {}


FAULTS: list[tuple[str, int]] = [
    ("create", 1),
    ("write", 0),
    ("write", 3),
    ("finish", 0),
    ("finish", 1),
    ("barrier", 0),
    ("put", 0),
    ("put_done", 0),
    ("list", 1),
]


@pytest.mark.parametrize(("stage", "at"), FAULTS)
@pytest.mark.parametrize("error", [StorageError("EIO"), OSError("raw"), TypeError("a bug")], ids=repr)
async def test_a_failure_at_any_stage(stage: str, at: int, error: Exception) -> None:
    old = {"old": np.ones(3)}
    storage = Staged()
    await save(storage, old, save_id=OTHER)
    storage.calls.clear()
    storage.hooks = {stage: fails(error, at)}
    run, _ = writer_of(storage, ARRAYS, file_limit=70_000, overwrite=True)
    with pytest.raises(AsyncDCPError, match=str(error)) as caught:
        await run.run()
    assert caught.value is error or caught.value.__cause__ is error
    assert isinstance(caught.value, StorageError) == isinstance(error, OSError)
    nothing_is_left(storage)
    record = record_in(storage)
    assert record and record.outcome == "abort" and record.rank == 0 and str(error) in str(record.cause)
    storage.hooks = {}
    assert (await read_all(storage)).keys() == old.keys()


@pytest.mark.parametrize(("stage", "at"), [("list", 0), ("create", 0)])
async def test_a_failure_before_anything_was_written_leaves_no_trace(stage: str, at: int) -> None:
    storage = Staged(**{stage: fails(StorageError("EIO"), at)})
    with pytest.raises(StorageError, match="EIO"):
        await save(storage, ARRAYS)
    assert not storage._objects and not storage._unfinished


async def test_a_put_that_was_carried_out_and_failed_leaves_nothing_without_tensors_either() -> None:
    storage = Staged(put_done=fails(StorageError("EIO")))
    with pytest.raises(StorageError, match="EIO"):
        await save(storage, {})
    nothing_is_left(storage)
    record = record_in(storage)
    assert record and record.outcome == "abort"


async def test_an_index_that_nobody_could_read_is_not_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Staged()
    await save(storage, {"old": np.ones(3)}, save_id=OTHER)
    for limits in ("pipeline.writer", "pipeline.records"):
        monkeypatch.setattr(f"asyncdcp.{limits}.INDEX_LIMIT", 2000)
    with pytest.raises(UnsupportedValue, match="5,010 of them are plain values"):
        await save(storage, ARRAYS, values=msgspec.Raw(b'{"log":"%s"}' % (b"x" * 5000)), overwrite=True)
    nothing_is_left(storage)
    assert (await read_all(storage)).keys() == {"old"}


async def test_an_index_that_was_there_before_is_not_deleted() -> None:
    storage = Staged()
    await MemoryStorage.put(storage, index_name(SAVE, 0), b"another's")
    storage.hooks["put"] = fails(FileExistsError("there"))
    with pytest.raises(StorageError, match="there"):
        await save(storage, ARRAYS)
    assert storage._objects[index_name(SAVE, 0)] == b"another's"


# ── giving up ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("stage", "at"), [("list", 0), ("create", 0), *FAULTS])
async def test_giving_up_where_the_storage_hangs(stage: str, at: int) -> None:
    """The hung call is cancelled, and the save settles."""
    storage = Staged()
    run, _ = writer_of(storage, ARRAYS, file_limit=70_000)

    async def hang(number: int) -> None:
        if number == at:
            run.give_up.set(Reason("cancelled", Cancelled("enough")))
            run.give_up.set(Reason("failed", StorageError("too late to matter")))
            if stage != "list" or at == 0:  # settling is not interrupted
                await anyio.sleep_forever()

    storage.hooks = {stage: hang}
    with pytest.raises(Cancelled, match="enough"):
        await run.run()
    nothing_is_left(storage)
    record = record_in(storage)
    if (stage, at) in (("list", 0), ("create", 0)):
        assert record is None
    else:
        assert record and record.outcome == "abort" and record.cause == "cancelled: enough"


@pytest.mark.parametrize("local", [True, False])
async def test_giving_up_before_it_begins_writes_nothing(local: bool, tmp_path: Any) -> None:
    storage = LocalStorage(tmp_path / "new") if local else Staged()
    run, slabs = writer_of(storage, ARRAYS)
    run.give_up.set(Reason("cancelled", Cancelled("enough")))
    with pytest.raises(Cancelled):
        await run.run()
    assert await storage.list() == {} and not (tmp_path / "new").exists()
    assert not slabs.given_back


async def test_giving_up_once_the_commit_is_claimed_is_too_late() -> None:
    storage = Staged()
    run, _ = writer_of(storage, ARRAYS)

    async def late(_: int) -> None:
        run.give_up.set(Reason("cancelled", Cancelled("enough")))

    storage.hooks = {"claim_commit": late}
    assert (await run.run()).save_id == SAVE
    assert (await read_all(storage)).keys() == ARRAYS.keys()


async def test_giving_up_while_staging_never_ends() -> None:
    storage = Staged()
    run, slabs = writer_of(storage, ARRAYS)
    last = slabs.ready.pop()
    receive = slabs.receive

    async def stuck() -> SlabReady:
        if slabs.ready:
            return await receive()
        run.give_up.set(Reason("failed", StorageError("staging failed")))
        await anyio.sleep_forever()
        return last

    slabs.receive = stuck  # type: ignore[method-assign]  # a source that is stuck
    with pytest.raises(StorageError, match="staging failed"):
        await run.run()
    nothing_is_left(storage)


async def test_a_commit_waits_no_longer_than_its_deadline_for_what_it_has_replaced_to_go(
    caplog: pytest.LogCaptureFixture,
) -> None:
    storage = Staged()
    await save(storage, ARRAYS, save_id=OTHER)
    run, _ = writer_of(storage, ARRAYS, overwrite=True)

    async def late(_: int) -> None:
        run._until = anyio.current_time()

    async def stuck(_: int) -> None:
        await anyio.sleep_forever()

    storage.hooks = {"claimed": late, "delete": stuck}
    assert (await run.run()).replaced == [OTHER]
    assert "replaced checkpoints could not be deleted: TimeoutError()" in caplog.text


async def test_a_deadline() -> None:
    async def hang(_: int) -> None:
        leap(LONG)
        await anyio.sleep_forever()

    storage = Staged(write=hang)
    with pytest.raises(DeadlineExceeded, match="save_deadline"):
        await save(storage, ARRAYS, deadline=LONG)
    nothing_is_left(storage)
    record = record_in(storage)
    assert record and str(record.cause).startswith("deadline: ")


# ── slabs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "slab",
    [
        SlabReady(0, 0, 0, SLAB),  # a second time
        SlabReady(0, 6, 0, SLAB),
        SlabReady(0, -1, 0, SLAB),
        SlabReady(1, 0, 0, SLAB),
        SlabReady(-1, 0, 0, SLAB),
        SlabReady(0, 5, 5, 1),  # shorter than it should be
    ],
)
async def test_slabs_that_cannot_be(slab: SlabReady) -> None:
    storage = Staged()
    run, slabs = writer_of(storage, ARRAYS)
    slabs.ready.insert(1, slab)
    with pytest.raises(AsyncDCPError, match="not a slab of this save"):
        await run.run()
    nothing_is_left(storage)


async def test_slabs_that_are_missing() -> None:
    storage = Staged()
    run, slabs = writer_of(storage, ARRAYS)
    slabs.ready.pop()
    with pytest.raises(AsyncDCPError, match=f"before all slabs of {data_name(SAVE, 0, 0)}"):
        await run.run()
    nothing_is_left(storage)


# ── bugs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_cleaning_up_goes_on_where_it_fails() -> None:
    storage = Staged(write=fails(StorageError("EIO"), 2), abort=fails(TypeError("a bug")), delete=fails(KeyError("x")))
    with pytest.raises(StorageError, match="EIO"):
        await save(storage, ARRAYS, file_limit=20_000)
    assert storage.calls.count("create") >= storage.calls.count("abort") > 1
    assert not storage._unfinished


@pytest.mark.parametrize("place", ["transform", "settle", "machine"])
async def test_a_bug_leaves_nothing_open(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> None:
        raise TypeError("a bug")

    if place == "transform":
        monkeypatch.setattr(transform, "checksum_blocks", bug)
    elif place == "settle":
        monkeypatch.setattr(settle, "encode_record", bug)
    else:
        monkeypatch.setattr(CommitMachine, "on", bug)
    storage = Staged(write=fails(StorageError("EIO"), 3) if place == "machine" else fails(TypeError(), 99))
    with pytest.raises((AsyncDCPError, TypeError)):
        await save(storage, ARRAYS, file_limit=20_000)
    assert not storage._unfinished
    record = record_in(storage)
    assert record is None or record.outcome == "abort"


async def test_a_cancelled_task_leaves_nothing_open() -> None:
    reached = asyncio.Event()

    async def hang(_: int) -> None:
        reached.set()
        await anyio.sleep_forever()

    storage = Staged(write=hang)
    task = asyncio.create_task(save(storage, ARRAYS))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not storage._unfinished


async def test_a_cancelled_task_waits_for_the_thread_that_reads_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await is_waited_for("asyncdcp.pipeline.transform.checksum_blocks", save(Staged(), ARRAYS), monkeypatch)
