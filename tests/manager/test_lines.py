"""Terms, rollbacks, writers that were replaced, damage."""

from __future__ import annotations

import errno
import gc
import itertools
import logging
import os
import threading
import weakref
from pathlib import Path

import pytest
import torch
from anyio import sleep_forever, to_thread
from anyio.lowlevel import checkpoint

from asyncdcp import KeepLast, Options
from asyncdcp.errors import Cancelled, CorruptCheckpoint, Fenced, StorageError, StorageUnavailable, UsageError
from asyncdcp.runs.layout import LineStart
from asyncdcp.storage import LocalPlace, Survey
from asyncdcp.storage.place import Selects
from asyncdcp.storage.posix import OS, FileStatus
from tests.manager.conftest import Opened, Training, save_all
from tests.work import LONG


def test_after_a_rollback_what_is_left_behind_does_not_count(opened: Opened, training: Training) -> None:
    with opened() as manager:
        save_all(manager, training, 400, 500, 900)
        restored = manager.restore(500, training.state).result()
        assert restored.step == training.step == 500
        latest = manager.latest().result()
        assert latest is not None and latest.step == 500
    with opened(keep=KeepLast(2)) as manager:  # a restart before anything was saved anew: still not 900
        restored_too = manager.restore_latest(training.state).result()
        assert restored_too is not None and restored_too.step == 500
        save_all(manager, training, 600, 900)
        assert manager.steps().result() == [600, 900]
        assert manager.load(900).result()["progress"] == {"step": 900}


def test_retention_leaves_the_old_line_alone(opened: Opened, training: Training, run: Path) -> None:
    manager = opened(keep=KeepLast(1))
    save_all(manager, training, 400)
    with opened() as other:
        save_all(other, training, 500, 900)
        other.restore(500, training.state).result()
    manager = opened(keep=KeepLast(1))
    manager.restore_latest(training.state).result()
    save_all(manager, training, 600)
    assert manager.steps().result() == [600]
    assert sorted(path.name for path in run.glob("step_*")) == ["step_600", "step_900"]


def test_an_older_writer_is_fenced(opened: Opened, training: Training, run: Path) -> None:
    old = opened(keep=KeepLast(1))
    save_all(old, training, 10)
    new = opened()
    new.restore_latest(Training().state).result()
    old.save(20, training.at(20)).result()  # it does not know yet; this is committed, and does not count
    with pytest.raises(Fenced, match=r"taken .* over with term 2, and this one has term 1"):
        old.wait().result()
    with pytest.raises(Fenced):
        old.save(30, training.at(30))
    assert new.steps().result() == [10]  # the old one has deleted nothing
    save_all(new, training, 20)  # which takes the place of the late one
    assert new.steps().result() == [10, 20]
    found = new.latest().result()
    assert found is not None and found.term == 2
    with pytest.raises(Fenced):
        old.close()


def test_an_older_writer_never_replaces_what_a_newer_one_saved(opened: Opened, training: Training) -> None:
    old = opened()
    old.restore_latest(training.state).result()
    new = opened()
    save_all(new, training, 20)
    with pytest.raises(Fenced, match=r"term 2 of the run has committed .*step_20"):
        old.save(20, training.at(20)).result()
    assert new.steps().result() == [20]


def test_a_rollback_by_a_writer_that_was_replaced(opened: Opened, training: Training) -> None:
    old = opened()
    save_all(old, training, 10, 20)
    opened()
    with pytest.raises(Fenced):
        old.restore(10, training.state).result()


def test_damage_makes_it_fall_back_loudly(
    opened: Opened, training: Training, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened() as manager:
        save_all(manager, training, 10, 20, 30)
    (data,) = (run / "step_30").glob("*.safetensors")
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    os.truncate(next((run / "step_20").glob("*.safetensors")), 10)
    manager = opened()
    with caplog.at_level(logging.ERROR, "asyncdcp.manager"):
        restored = manager.restore_latest(training.at(0)).result()
    assert restored is not None and restored.step == training.step == 10
    assert "step 30 cannot be restored, an older one is tried" in caplog.text
    save_all(manager, training, 20, 30)  # the damaged ones are off the line, and their steps are saved anew
    assert manager.steps().result() == [10, 20, 30]


def test_a_step_whose_record_is_destroyed_is_saved_anew(opened: Opened, training: Training, run: Path) -> None:
    with opened() as manager:
        save_all(manager, training, 10, 20)
    (record,) = (path for path in (run / "step_20").glob("*.json") if "index" not in path.name)
    record.write_bytes(record.read_bytes().replace(b'"commit"', b'"COMMIT"'))
    manager = opened()
    restored = manager.restore_latest(training.at(0)).result()
    assert restored is not None and restored.step == 10
    save_all(manager, training, 20)
    assert manager.steps().result() == [10, 20]
    assert not record.exists(), "what is replaced goes"
    opened(read_only=True).restore_latest(training.at(0)).result()
    assert training.step == 20


def test_a_restore_that_passed_over_damage_lets_the_state_go_without_the_garbage_collector(
    opened: Opened, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = opened()
    for step in (1, 2):
        manager.save(step, {"w": torch.ones(3)}).result()
    (data,) = (run / "step_2").glob("*.safetensors")
    data.write_bytes(data.read_bytes()[:-4] + bytes(4))
    state = {"w": torch.zeros(3)}
    gone = threading.Event()
    weakref.finalize(state["w"], gone.set).atexit = False
    gc.collect()
    gc.disable()
    try:
        restored = manager.restore_latest(state).result()
        assert restored is not None and restored.step == 1
        del state
        caplog.clear()  # of the record of the damage
        assert gone.wait(LONG)  # a thread that has told of its end may have its last lines before it
    finally:
        gc.enable()


def test_a_limit_on_open_files_is_no_damage(
    opened: Opened, training: Training, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest checkpoint is whole: an older one in its place would lose it."""
    with opened() as manager:
        save_all(manager, training, 10, 20)
    manager, system = opened(), OS.open
    manager.steps().result()

    def limited(self: OS, path: str, flags: int, /) -> int:
        if "step_20" in path and path.endswith(".safetensors"):
            raise OSError(errno.EMFILE, "Too many open files", path)
        return system(self, path, flags)

    with monkeypatch.context() as patched:
        patched.setattr(OS, "open", limited)
        with pytest.raises(StorageError, match=r"Too many open files; raise RLIMIT_NOFILE"):
            manager.restore_latest(training.at(0)).result()
    restored = manager.restore_latest(training.at(0)).result()
    assert restored is not None and restored.step == 20


@pytest.mark.parametrize("what", ["folder", "Record"])
def test_what_nobody_lets_us_read_is_no_damage(
    opened: Opened, training: Training, run: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    with opened() as manager:
        save_all(manager, training, 10, 20)
    newest, open_, scan = str(run / "step_20"), OS.open, OS.scan

    def closed(self: OS, path: str, flags: int, /) -> int:
        if what == "Record" and path.startswith(newest) and path.endswith(".json"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return open_(self, path, flags)

    def hidden(self: OS, path: str, /) -> dict[str, FileStatus]:
        if what == "folder" and path == newest:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(self, path)

    monkeypatch.setattr(OS, "open", closed)
    monkeypatch.setattr(OS, "scan", hidden)
    manager = opened(read_only=True)
    assert manager.steps().result() == [10]
    with pytest.raises(StorageUnavailable, match=r"step_20.*: Permission denied"):
        manager.restore_latest(training.at(0)).result()
    assert training.step == 0


def test_what_was_read_is_reported(opened: Opened, training: Training) -> None:
    """As by a checkpointer's load; of several that were tried, of the one that was loaded."""
    manager = opened()
    save_all(manager, training, 10)
    more = {**training.at(0), "more": torch.ones(1)}
    verbs = (manager.restore_latest(more, strict=False), manager.restore(10, more, strict=False))
    for future in (*verbs, manager.load(10, more, strict=False)):
        future.result()
        assert future.report.missing == ("more",) and future.report.path.endswith("step_10")


def test_nothing_but_damage_is_an_error(opened: Opened, training: Training, run: Path) -> None:
    with opened() as manager:
        save_all(manager, training, 10)
    os.truncate(next((run / "step_10").glob("*.safetensors")), 10)
    manager = opened()
    with pytest.raises(CorruptCheckpoint, match=r"no checkpoint in .* is whole: step_10: .* are missing"):
        manager.restore_latest(training.state).result()


def test_a_save_that_still_moves_is_waited_for(opened: Opened, training: Training, run: Path) -> None:
    """What an outliving background process does: it grows, and then commits."""
    with opened() as manager:
        save_all(manager, training, 10, 20)
    names = {path.name: path.read_bytes() for path in (run / "step_20").iterdir()}
    (record,) = (name for name in names if name.count("-") == 0)
    (data,) = (name for name in names if name.endswith("safetensors"))
    (run / "step_20" / record).unlink()
    looks = itertools.count(1)

    class Moving(LocalPlace):
        async def survey(self, selects: Selects, limit: int) -> Survey:
            """Since the last look it has grown; and at last it has committed."""
            look = next(looks)
            (run / "step_20" / data).write_bytes(names[data] + bytes(look if look < 8 else 0))
            if look == 8:
                (run / "step_20" / record).write_bytes(names[record])
            return await super().survey(selects, limit)

    manager = opened(Moving(run), takeover_seconds=0.05)
    assert manager.steps().result() == [10, 20] and next(looks) > 8


def test_a_save_that_does_not_move_is_given_up(opened: Opened, training: Training, run: Path) -> None:
    with opened() as manager:
        save_all(manager, training, 10, 20)
    (record,) = (path for path in (run / "step_20").iterdir() if "-" not in path.name)
    record.unlink()
    with opened() as manager:
        assert manager.steps().result() == [10]
        assert [path.name for path in (run / "step_20").iterdir()] == [record.name]  # an abort, and nothing else
        save_all(manager, training, 20)
        assert manager.steps().result() == [10, 20]


def test_nothing_is_saved_while_a_restore_is_under_way(opened: Opened, training: Training) -> None:
    """It would be off the line as soon as it is durable."""
    manager = opened()
    save_all(manager, training, 1, 2)
    held = threading.Event()
    manager._engine.call(held.wait, 30)
    restored = manager.restore(1, training.state)
    with pytest.raises(UsageError, match="a restore is under way; await it"):
        manager.save(3, training.state)
    held.set()
    restored.result()
    save_all(manager, training, 3)
    assert manager.steps().result() == [1, 3]


def test_a_rollback_that_is_cancelled_once_the_line_has_changed_is_one(
    opened: Opened, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what is saved next would not be on the line."""
    manager = opened()
    save_all(manager, training, 1, 2)
    write, written, goes_on = manager._session._writer._write, threading.Event(), threading.Event()

    async def slowly(start: LineStart) -> None:
        await write(start)
        written.set()
        await to_thread.run_sync(goes_on.wait, LONG)
        await checkpoint()  # as an object store's barrier has some

    with monkeypatch.context() as patched:
        patched.setattr(manager._session._writer, "_write", slowly)
        restored = manager.restore(1, training.state)
        assert written.wait(LONG)
        restored.cancel()
        manager.steps().result(LONG)  # the loop has gone on: it is cancelled
        goes_on.set()
        assert restored.exception(LONG) is None
    save_all(manager, training, 3)
    assert manager.steps().result() == [1, 3]


def test_a_rollback_that_is_cancelled_before_the_line_has_changed_is_none(
    opened: Opened, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it wait for a storage that does not answer."""
    manager = opened()
    save_all(manager, training, 1, 2)
    asked = threading.Event()

    async def never() -> None:
        asked.set()
        await sleep_forever()

    with monkeypatch.context() as patched:
        patched.setattr(manager._session._writer, "look", never)
        restored = manager.restore(1, training.state)
        assert asked.wait(LONG)
        restored.cancel()
        assert isinstance(restored.exception(LONG), Cancelled)
    save_all(manager, training, 3)
    assert manager.steps().result() == [1, 2, 3]


def test_options_reach_the_checkpointer(opened: Opened, training: Training) -> None:
    manager = opened(options=Options(when_busy="skip", on_error="warn"))
    save_all(manager, training, 1)
    assert manager.steps().result() == [1]
