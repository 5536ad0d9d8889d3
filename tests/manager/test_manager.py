"""A manager's everyday verbs."""

from __future__ import annotations

import asyncio
import math
import threading
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trio
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from asyncdcp import CheckpointManager, EverySteps, KeepBest, KeepEvery, KeepLast, SyncCheckpointer, ZStandard, follow
from asyncdcp.errors import CheckpointExists, CheckpointGone, CheckpointNotFound, Closed, InvalidOption
from asyncdcp.runs import list_checkpoints, look, read_history
from asyncdcp.storage import LocalPlace, MemoryPlace
from tests.manager.conftest import Opened, Training, save_all


def test_an_empty_run_has_nothing(opened: Opened, training: Training) -> None:
    manager = opened()
    assert manager.restore_latest(training.state).result() is None
    assert (manager.steps().result(), manager.latest().result(), manager.best("loss").result()) == ([], None, None)


def test_what_was_saved_is_restored(opened: Opened, training: Training) -> None:
    with opened() as manager:
        manager.restore_latest(training.state).result()
        save_all(manager, training, 10, 20)
        manager.save(
            30, training.at(30), metrics={"loss": torch.tensor(0.5, requires_grad=True)}, metadata={"entropy": 2**127}
        )
    other = Training()
    manager = opened()
    restored = manager.restore_latest(other.state).result()
    assert restored is not None
    assert (restored.step, other.step, restored.metrics) == (30, 30, {"loss": 0.5})
    assert restored.metadata == {"entropy": 2**127}
    assert manager.steps().result() == [10, 20, 30]
    assert manager.load(20).result()["progress"] == {"step": 20}
    renamed = {"at": {"step": 0}}
    manager.load(20, renamed, keys=["progress.*"], rename={"progress": "at"}).result()
    assert renamed == {"at": {"step": 20}}


async def test_as_an_async_context(run: Path, training: Training) -> None:
    async with CheckpointManager(run, process=False, save_when=EverySteps(2)) as manager:
        assert await manager.restore_latest(training.state) is None
        for step in range(1, 6):
            if manager.should_save(step):
                await manager.save(step, training.at(step)).staged
        await manager.wait()
        assert await manager.steps() == [2, 4]
    async with CheckpointManager(run, process=False, read_only=True) as manager:
        latest = await manager.latest()
        assert latest is not None and latest.step == 4


def test_with_the_background_process(run: Path, training: Training) -> None:
    with CheckpointManager(run, keep=KeepLast(1), takeover_seconds=0) as manager:
        for step in (1, 2, 3):
            manager.save(step, training.at(step), metrics={"loss": step}).staged.result()
    (only,) = asyncio.run(list_checkpoints(run))
    assert (only.step, only.term, only.metrics) == (3, 1, {"loss": 3.0})


def test_with_extensions(opened: Opened, training: Training) -> None:
    manager = opened(extensions=[ZStandard()], keep=KeepLast(1))
    save_all(manager, training, 1, 2)
    (only,) = manager.checkpoints().result()
    assert only.step == 2 and only.summary is not None and only.summary.transforms
    assert manager.load(2).result()["progress"] == {"step": 2}


def test_in_memory(opened: Opened, training: Training) -> None:
    place = MemoryPlace("run")
    with opened(place, keep=KeepLast(1)) as manager:
        save_all(manager, training, 1, 2)
    manager = opened(place, read_only=True)
    assert manager.steps().result() == [2]


def test_retention_and_best(opened: Opened, training: Training) -> None:
    manager = opened(keep=KeepLast(1) | KeepBest("loss") | KeepEvery(40))
    for step, loss in ((10, 3.0), (20, 1.0), (30, math.nan), (40, 2.0), (50, 2.0), (60, 4.0)):
        save_all(manager, training, step, metrics={"loss": loss})
    assert manager.steps().result() == [20, 40, 60]
    best = manager.best("loss").result()
    assert best is not None and best.step == 20
    history = asyncio.run(read_history(LocalPlace(manager.location)))
    assert [(line.step, line.metrics["loss"]) for line in history] == [
        (10, 3.0), (20, 1.0), (30, None), (40, 2.0), (50, 2.0), (60, 4.0),
    ]  # fmt: skip
    assert all(0 < line.staged_seconds <= line.durable_seconds and line.tensor_bytes == 128 for line in history)


def test_records_name_term_and_parent(opened: Opened, training: Training, run: Path) -> None:
    with opened() as manager:
        save_all(manager, training, 1, 2)
    with opened() as manager:
        save_all(manager, training, 3)
    first, second, third = asyncio.run(list_checkpoints(run))
    assert [each.term for each in (first, second, third)] == [1, 1, 2]
    assert [first.parent, second.parent, third.parent] == [None, first.save_id, second.save_id]


def test_steps_only_grow(opened: Opened, training: Training) -> None:
    manager = opened(save_when=EverySteps(1))
    save_all(manager, training, 10)
    for step in (10, 9):
        with pytest.raises(CheckpointExists, match="has step 10 already, and steps only grow"):
            manager.save(step, training.state)
        assert not manager.should_save(step)
    assert manager.should_save(11) and manager.should_save(11)
    save_all(manager, training, 11)
    assert not manager.should_save(11)


def test_a_first_step_that_is_none_is_refused(opened: Opened) -> None:
    with pytest.raises(InvalidOption, match="a step is a whole number"):
        opened(save_when=EverySteps(1)).should_save("1")  # type: ignore[arg-type]  # on purpose


def test_a_step_whose_save_failed_can_be_saved_again(opened: Opened, training: Training) -> None:
    manager = opened()
    handle = manager.save(10, training.at(10))
    handle.cancel()
    failed = handle.exception() is not None
    manager.save(10 if failed else 11, training.at(11)).result()


def test_a_done_callback_may_wait_for_what_is_under_way(opened: Opened, training: Training) -> None:
    manager, other = opened(), Training()
    saved, waited, told = threading.Event(), threading.Event(), list[BaseException | None]()

    def wait(_: object) -> None:
        saved.wait(30)
        told.append(manager.wait().exception(20))
        waited.set()

    manager.save(1, training.at(1)).add_done_callback(wait)
    manager.save(2, other.at(2))
    saved.set()
    assert waited.wait(30) and told == [None]


def test_read_only_claims_nothing(opened: Opened, training: Training, run: Path) -> None:
    with opened() as manager:
        save_all(manager, training, 1)
    before = sorted(path for path in run.rglob("*"))
    reader = opened(read_only=True)
    reader.restore_latest(training.state).result()
    reader.restore(1, training.state).result()
    with pytest.raises(InvalidOption, match="read-only"):
        reader.save(2, training.state)
    assert sorted(path for path in run.rglob("*")) == before


def test_a_checkpoint_that_was_deleted_while_it_was_read(opened: Opened, training: Training) -> None:
    manager = opened(keep=KeepLast(1))
    save_all(manager, training, 1)
    (listed,) = manager.checkpoints().result()
    save_all(manager, training, 2)
    with pytest.raises(CheckpointGone, match="was deleted before it was read"):
        manager.load(listed).result()
    with pytest.raises(CheckpointNotFound, match=r"no checkpoint of step 1 on the line of .*; there are 2"):
        manager.restore(1, training.state).result()


def test_checkpoints_of_a_plain_checkpointer_are_taken_over(run: Path, opened: Opened, training: Training) -> None:
    with SyncCheckpointer(process=False) as checkpointer:
        for step in (10, 20):
            checkpointer.save(run / f"step_{step:06d}", training.at(step))
    manager = opened(keep=KeepLast(2))
    restored = manager.restore_latest(training.at(0)).result()
    assert restored is not None and restored.step == training.step == 20
    save_all(manager, training, 30)
    assert manager.steps().result() == [20, 30]


def test_made_in_a_trio_program(run: Path, training: Training) -> None:
    async def main() -> None:
        async with CheckpointManager(run, process=False, mirror=run.with_name("far")) as manager:
            await manager.restore_latest(training.state)
            await manager.save(1, training.at(1))
            await manager.wait()
            assert await manager.steps() == [1]
            assert (await manager.load(1))["progress"] == {"step": 1}
        async with aclosing(follow(run.with_name("far"))) as published:
            assert (await anext(published)).step == 1

    trio.run(main)


def test_without_opening_the_first_verb_opens(run: Path, training: Training) -> None:
    manager = CheckpointManager(run, process=False)
    manager.save(1, training.at(1))
    manager.close()
    manager.close()
    with pytest.raises(Closed):
        manager.save(2, training.state)
    assert asyncio.run(look(LocalPlace(run))).steps() == [1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": 3}, "keep takes a policy such as KeepLast"),
        ({"keep": KeepLast}, "keep takes a policy such as KeepLast"),
        ({"save_when": 100}, "save_when takes policies"),
        ({"save_when": [EverySteps]}, "save_when takes policies"),
        ({"takeover_seconds": -1}, "takeover_seconds takes"),
        ({"takeover_seconds": "5"}, "takeover_seconds takes"),
        ({"run": "here", "mirror": "./here", "mirror_keep": KeepLast(1)}, "here is the run's own"),
        ({"run": ""}, "target is ''"),
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match=message):
        CheckpointManager(**{"run": tmp_path / "run", "process": False, **wrong})
    assert not (tmp_path / "run").exists()


def test_wrong_arguments_are_refused(opened: Opened, training: Training, run: Path) -> None:
    manager = opened()
    with pytest.raises(InvalidOption, match="metrics takes numbers by name"):
        manager.save(1, training.state, metrics=0.5)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(InvalidOption, match=r"metrics\['tokens'\] is 1000+; metrics take numbers: int too large"):
        manager.save(1, training.state, metrics={"tokens": 10**400})
    with pytest.raises(InvalidOption, match=r"metrics\['loss'\] is 'low'; metrics take numbers"):
        manager.save(1, training.state, metrics={"loss": "low"})  # type: ignore[dict-item]  # on purpose
    with pytest.raises(InvalidOption, match="metrics takes a mapping that JSON can carry"):
        manager.save(1, training.state, metrics={"loss\udcff": 1.0})
    with pytest.raises(InvalidOption, match=r"metrics has .* bytes as JSON, and may have"):
        manager.save(1, training.state, metrics={"x" * (32 << 20): 1.0})
    with pytest.raises(InvalidOption, match="a step is a whole number"):
        manager.save(1.0, training.state)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(InvalidOption, match=r"from 0 up, not .*int64\(7\); int\(\) makes one of it"):
        manager.save(np.int64(7), training.state)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(InvalidOption, match=r"from 0 up, not .{80}$"):
        manager.save({"swapped": "with the state" * 100}, 1)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(InvalidOption, match="restore takes the state"):
        manager.restore_latest(None)
    assert not list(run.glob("step_*"))


def test_a_run_that_is_a_file_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a run")
    with pytest.raises(OSError, match="file: Not a directory"), CheckpointManager(tmp_path / "file", process=False):
        pass


@pytest.mark.parametrize("read_only", [False, True])
def test_a_checkpoint_is_not_taken_for_a_run_with_nothing_to_resume_from(
    opened: Opened, training: Training, run: Path, *, read_only: bool
) -> None:
    save_all(opened(), training, 9)
    before = sorted((run / "step_9").iterdir())
    with (
        pytest.raises(InvalidOption, match="step_9 is a checkpoint, and no run: give the folder that it is in"),
        CheckpointManager(run / "step_9", process=False, read_only=read_only) as manager,
    ):
        manager.restore_latest(training.state).result()
    assert sorted((run / "step_9").iterdir()) == before


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_another_format_is_told_of_where_there_is_nothing_to_resume_from(
    opened: Opened, training: Training, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dcp_save({"weight": torch.ones(32)}, checkpoint_id=run / "step_9", no_dist=True)
    assert opened().restore_latest(training.state).result() is None
    assert "step_9 holds a checkpoint of another format" in caplog.text
    caplog.clear()
    manager = opened()
    manager.save(10, training.at(10)).result()
    assert manager.restore_latest(training.state).result() is not None
    assert "another format" not in caplog.text


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_step_whose_folder_is_another_formats_is_not_saved_into_it(
    opened: Opened, training: Training, run: Path
) -> None:
    dcp_save({"weight": torch.ones(32)}, checkpoint_id=run / "step_9", no_dist=True)
    before = sorted((run / "step_9").iterdir())
    manager = opened()
    with pytest.raises(CheckpointExists, match="step_9; give the run a directory of its own"):
        manager.save(9, training.at(9)).result()
    assert sorted((run / "step_9").iterdir()) == before
    save_all(manager, training, 10)
