"""Terms, rollbacks, writers that were replaced, damage."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest

from asyncdcp import KeepLast, Options
from asyncdcp.errors import CorruptCheckpoint, Fenced
from tests.manager.conftest import Opened, Training, save_all


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
    stop = threading.Event()

    def move() -> None:
        for _ in range(6):
            (run / "step_20" / data).write_bytes(names[data] + os.urandom(1))
            stop.wait(0.1)
        (run / "step_20" / data).write_bytes(names[data])
        (run / "step_20" / record).write_bytes(names[record])

    mover = threading.Thread(target=move)
    mover.start()
    manager = opened(takeover_seconds=0.4)
    mover.join()
    assert manager.steps().result() == [10, 20]


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


def test_options_reach_the_checkpointer(opened: Opened, training: Training) -> None:
    manager = opened(options=Options(when_busy="skip", on_error="warn"))
    save_all(manager, training, 1)
    assert manager.steps().result() == [1]
