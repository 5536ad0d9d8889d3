"""What save() promises: at once, in order, off the trainer's loop; when tensors are free; what a busy one does."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import torch
import trio
import uvloop

from asyncdcp import AsyncCheckpointer, MemoryStorage, Options, Progress, SyncCheckpointer
from asyncdcp.checkpointer.saving import Lanes
from asyncdcp.errors import (
    AsyncDCPError,
    CheckpointerBusy,
    CheckpointExists,
    CheckpointNotFound,
    InvalidOption,
    SaveSkipped,
    StateMismatch,
    UnseenFailure,
    UnsupportedValue,
    VolatileStorageWarning,
)
from asyncdcp.names import make_save_id, record_save_id
from asyncdcp.pipeline.records import read_records

Opened = Callable[..., AsyncCheckpointer]
MIB = 1 << 20


def lanes(checkpointer: AsyncCheckpointer) -> Lanes:
    return checkpointer._lanes


def save_ids(folder: Path) -> set[str]:
    return {save_id for path in folder.iterdir() if (save_id := record_save_id(path.name))}


# ── off the trainer's loop ──


async def test_a_save_goes_on_while_the_trainers_loop_is_blocked(
    checkpointer: AsyncCheckpointer, tmp_path: Path
) -> None:
    state = {"w": torch.randn(2 * MIB)}
    checkpointer.prepare(state).result()
    durable: list[float] = []
    handle = checkpointer.save(tmp_path / "it", state)
    handle.add_done_callback(lambda _: durable.append(time.monotonic()))
    time.sleep(2)  # noqa: ASYNC251  # a trainer that blocks its own loop is the point
    unblocked = time.monotonic()
    result = await handle
    assert durable[0] < unblocked
    assert result.durable_seconds < 2


async def test_a_save_goes_on_beside_a_loop_that_is_busy_with_python(
    checkpointer: AsyncCheckpointer, tmp_path: Path
) -> None:
    handle = checkpointer.save(tmp_path / "it", {"w": torch.randn(MIB)})
    until, count = time.monotonic() + 30, 0
    while not handle.done() and time.monotonic() < until:
        count += 1
    assert handle.done()
    assert (await handle).tensor_bytes == 4 * MIB


# ── when tensors are free, and order ──


def test_tensors_may_be_changed_once_staged(checkpointer: AsyncCheckpointer, faulty: Any) -> None:
    storage = faulty()
    gate = storage.gate("write")
    state = {"small": torch.zeros(10), "big": torch.zeros(4 * MIB)}
    handle = checkpointer.save(storage, state)
    handle.staged.result()
    gate.wait_begun()
    for tensor in state.values():
        tensor.fill_(1)
    state["new"] = torch.zeros(1)
    gate.release.set()
    handle.result()
    loaded = checkpointer.load(storage).result()
    assert list(loaded) == ["small", "big"]
    assert not any(tensor.any() for tensor in loaded.values())


def test_values_are_taken_at_the_call(checkpointer: AsyncCheckpointer, faulty: Any) -> None:
    storage = faulty()
    gate = storage.gate("list")
    state: dict[str, Any] = {"losses": [1.0], "epoch": 1, "w": torch.ones(1)}
    handle = checkpointer.save(storage, state)
    gate.wait_begun()
    state["losses"].append(2.0)
    state["epoch"] = 2
    storage.open_all()
    handle.result()
    loaded = checkpointer.load(storage).result()
    assert (loaded["losses"], loaded["epoch"]) == ([1.0], 1)


def test_saves_are_committed_in_the_order_of_the_calls(checkpointer: AsyncCheckpointer, faulty: Any) -> None:
    settled: list[int] = []
    storages = [faulty(str(number)) for number in range(12)]

    def note(number: int, _: object) -> None:
        settled.append(number)

    gate = storages[0].gate("list")
    tensor = torch.zeros(100_000)
    handles = []
    for number, storage in enumerate(storages):
        handles.append(checkpointer.save(storage, {"w": tensor, "n": number}))
        handles[-1].add_done_callback(partial(note, number))
    handles[0].staged.result()
    assert not any(handle.done() for handle in handles)
    gate.release.set()
    for handle in handles:
        handle.result()
    for number, storage in enumerate(storages):
        assert checkpointer.load(storage).result()["n"] == number
    checkpointer.close()
    assert settled == list(range(12))


def test_several_saves_through_a_ring_of_one_slot(opened: Opened, bits: Any) -> None:
    checkpointer = opened(staging_bytes=1)
    torch.manual_seed(0)
    state = {"t": torch.randn(3000, 2100).t(), "e": torch.randn(2_500_000, 1).expand(2_500_000, 2), "s": torch.ones(3)}
    storages = [MemoryStorage(str(number)) for number in range(4)]
    handles = [checkpointer.save(storage, state) for storage in storages]
    for handle, storage in zip(handles, storages, strict=True):
        handle.result()
        loaded = checkpointer.load(storage).result()
        assert all(torch.equal(bits(loaded[name]), bits(tensor)) for name, tensor in state.items())
    arena = lanes(checkpointer).arenas._current
    assert arena is not None
    assert (arena.slots, arena.ring.statistics().in_use, arena.users) == (1, 0, 0)


def test_two_savers_on_different_threads(checkpointer: AsyncCheckpointer) -> None:
    storages = [[MemoryStorage(f"{thread}-{number}") for number in range(8)] for thread in range(4)]
    ready = threading.Barrier(4)

    def save(thread: int) -> None:
        ready.wait(30)
        handles = [
            checkpointer.save(storage, {"w": torch.full((1000,), thread), "n": n})
            for n, storage in enumerate(storages[thread])
        ]
        assert all(handle.result().tensors == 1 for handle in handles)

    threads = [threading.Thread(target=save, args=(n,)) for n in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for thread, row in enumerate(storages):
        for n, storage in enumerate(row):
            loaded = checkpointer.load(storage).result()
            assert loaded["n"] == n and bool((loaded["w"] == thread).all())


def test_a_done_callback_may_save(checkpointer: AsyncCheckpointer) -> None:
    handles, begun = [], threading.Event()

    def again(_: object) -> None:
        handles.append(checkpointer.save(second, {"w": torch.ones(2)}))
        begun.set()

    first, second = MemoryStorage(), MemoryStorage()
    checkpointer.save(first, {"w": torch.ones(1)}).add_done_callback(again)
    assert begun.wait(30)
    assert handles[0].result().tensors == 1


# ── awaiting ──


def on_uvloop(main: Callable[[], Any]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


@pytest.mark.parametrize("run", [lambda main: asyncio.run(main()), on_uvloop, trio.run])
def test_on_every_loop(run: Callable[[Any], None], tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncCheckpointer(process=False) as checkpointer:
            state = {"w": torch.arange(100_000)}
            await checkpointer.prepare(state)
            handle = checkpointer.save(tmp_path / "it", state)
            await handle.staged
            result = await handle
            assert result is await handle.committed
            loaded = await checkpointer.load(tmp_path / "it")
            assert torch.equal(loaded["w"], state["w"])
            checkpointer.save(tmp_path / "two", state)
        assert await_record(tmp_path / "two")

    run(main)


def await_record(folder: Path) -> bool:
    return len(save_ids(folder)) == 1


async def test_a_handle_unpacks_and_says_where_it_is(checkpointer: AsyncCheckpointer, faulty: Any) -> None:
    storage = faulty("place")
    gate = storage.gate("write")
    handle = checkpointer.save(storage, {"w": torch.ones(1)})
    staged, committed = handle
    assert (staged, committed) == (handle.staged, handle.committed)
    await staged
    assert repr(handle) == "<SaveHandle 'place' writing>"
    assert handle.path == "place"
    gate.release.set()
    assert (await committed).tensors == 1
    assert repr(handle) == "<SaveHandle 'place' settled>"
    assert handle.exception() is None


async def test_cancelling_a_task_that_awaits_does_not_cancel_the_save(
    checkpointer: AsyncCheckpointer, faulty: Any
) -> None:
    storage = faulty()
    gate = storage.gate("write")
    handle = checkpointer.save(storage, {"w": torch.ones(1)})

    async def wait() -> None:
        await handle

    task = asyncio.create_task(wait())
    await asyncio.to_thread(gate.wait_begun)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(wait(), 0.01)
    gate.release.set()
    assert (await handle).tensors == 1


# ── what a busy checkpointer does, attempts, overwriting ──


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


# ── progress, warnings ──


def test_progress_is_monotonic_and_reaches_the_total_in_the_callers_context(opened: Opened) -> None:
    checkpointer = opened(staging_bytes=8 * MIB)
    seen: list[Progress] = []
    places: set[tuple[str, str]] = set()
    variable = contextvars.ContextVar("variable", default="unset")

    def report(progress: Progress) -> None:
        seen.append(progress)
        places.add((threading.current_thread().name, variable.get()))
        raise ValueError("a callback that fails does no harm")

    def save() -> None:
        variable.set("the caller's")
        checkpointer.save(MemoryStorage(), {"w": torch.zeros(12 * MIB)}, on_progress=report).result()

    contextvars.copy_context().run(save)
    checkpointer.close()  # waits for callbacks
    assert places == {("asyncdcp-callbacks", "the caller's")}
    assert {progress.total for progress in seen} == {48 * MIB + 4096}
    for stage in ("stage", "write"):
        done = [progress.done for progress in seen if progress.stage == stage]
        assert done == sorted(done)
        assert done[-1] == 48 * MIB + 4096


def test_progress_of_a_load(checkpointer: AsyncCheckpointer) -> None:
    storage, seen = MemoryStorage(), list[Progress]()
    tied = torch.zeros(3 * MIB)
    checkpointer.save(storage, {"a": tied, "b": tied}).result()
    checkpointer.load(storage, on_progress=seen.append).result()
    untied = {"a": torch.ones(3 * MIB), "b": torch.ones(3 * MIB)}  # what is read once goes to two places
    checkpointer.load(storage, untied, on_progress=seen.append).result()
    checkpointer.close()
    first, last = (next(one for one in reversed(seen) if one.total == total) for total in (12 * MIB, 24 * MIB))
    assert {first.stage, last.stage} == {"verify"}
    assert (first.done, last.done) == (12 * MIB, 24 * MIB)


@pytest.fixture
def shm() -> Iterator[Path]:
    folder = Path("/dev/shm") / f"asyncdcp-test-{uuid.uuid4().hex}"
    yield folder
    rmtree(folder, ignore_errors=True)


def test_a_volatile_filesystem_is_warned_of_once_before_anything_is_begun(shm: Path) -> None:
    with AsyncCheckpointer(process=False) as checkpointer:
        with pytest.warns(VolatileStorageWarning, match="tmpfs") as caught:
            handle = checkpointer.save(shm / "a", {})
        assert handle.result().filesystem == "tmpfs"
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checkpointer.save(shm / "b", {}).result()
    with AsyncCheckpointer(process=False) as checkpointer, warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(VolatileStorageWarning):
            checkpointer.save(shm / "c", {})
    assert not (shm / "c").exists()


# ── results, the blocking twin, cost ──


def test_a_result_has_sizes_and_times(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
    handle = checkpointer.save(tmp_path / "it", {"a": torch.zeros(MIB), "b": torch.zeros(3, dtype=torch.int8)})
    result = handle.result()
    assert result.path == str(tmp_path / "it") == handle.path
    assert (result.tensors, result.tensor_bytes) == (2, 4 * MIB + 3)
    assert result.stored_bytes == sum(path.stat().st_size for path in (tmp_path / "it").glob("*.safetensors"))
    assert 0 < result.staged_seconds <= result.durable_seconds
    assert {"stage", "transform", "write", "sync", "commit"} <= set(result.stage_seconds)
    assert result.bytes_per_second > 0


def test_the_blocking_twin(tmp_path: Path) -> None:
    with SyncCheckpointer(Options(staging_bytes=8 * MIB), process=False) as checkpointer:
        state = {"w": torch.arange(10)}
        checkpointer.prepare(state)
        assert checkpointer.save(tmp_path / "it", state).tensors == 1
        target = {"w": torch.zeros(10, dtype=torch.int64)}
        assert checkpointer.load(tmp_path / "it", target) is target
        assert torch.equal(target["w"], state["w"])
        assert torch.equal(checkpointer.load(tmp_path / "it")["w"], state["w"])
        with pytest.raises(CheckpointExists):
            checkpointer.save(tmp_path / "it", state)
        with pytest.raises(CheckpointNotFound):
            checkpointer.load(tmp_path / "other")
