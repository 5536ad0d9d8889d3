"""No failure is lost, of a save or of what follows from it, and each comes up where it can be dealt with."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest

from asyncdcp import KeepLast, Options
from asyncdcp.errors import StorageUnavailable, UnseenFailure
from asyncdcp.runs.layout import HISTORY
from asyncdcp.storage import LocalPlace
from asyncdcp.storage.posix import OS
from tests.manager.conftest import Opened, Training, save_all


class FailingOS(OS):
    """Calls on paths that end in ``suffix`` fail, once it is set."""

    def __init__(self, operation: str, number: int = errno.EIO) -> None:
        self.suffix: str | None = None
        real = getattr(self, operation)

        def call(path: str, *args: Any) -> Any:
            if self.suffix is not None and path.endswith(self.suffix):
                raise OSError(number, os.strerror(number), path)
            return real(path, *args)

        setattr(self, operation, call)


def test_a_save_that_failed_unseen_surfaces_at_the_next_verb(opened: Opened, training: Training, run: Path) -> None:
    system = FailingOS("mkdir")
    manager = opened(LocalPlace(run, posix=system))
    save_all(manager, training, 10)
    system.suffix = "step_20"
    manager.save(20, training.at(20))
    with pytest.raises(UnseenFailure, match=r"step_20.*Input/output error"):
        manager.wait().result()
    system.suffix = None
    save_all(manager, training, 20)  # said once; and the step can be saved again
    assert manager.steps().result() == [10, 20]


def test_a_failure_that_was_seen_is_not_told_again(opened: Opened, training: Training, run: Path) -> None:
    system = FailingOS("mkdir")
    manager = opened(LocalPlace(run, posix=system))
    system.suffix = "step_20"
    with pytest.raises(OSError, match="Input/output error"):
        manager.save(20, training.at(20)).result()
    manager.wait().result()


def test_retention_that_fails_surfaces_and_loses_nothing(opened: Opened, training: Training, run: Path) -> None:
    system = FailingOS("unlink")
    manager = opened(LocalPlace(run, posix=system), keep=KeepLast(1))
    save_all(manager, training, 10)
    system.suffix = ".json"  # no Record can be deleted
    manager.save(20, training.at(20)).result()
    with pytest.raises(UnseenFailure, match=r"cannot delete from .*step_10.*Input/output error"):
        manager.wait().result()
    assert manager.steps().result() == [10, 20]
    system.suffix = None
    save_all(manager, training, 30)
    assert manager.steps().result() == [30]


def test_a_history_that_cannot_be_written_does_not_keep_retention_from_making_room(
    opened: Opened, training: Training, run: Path
) -> None:
    manager = opened(keep=KeepLast(1))
    save_all(manager, training, 10)
    (run / HISTORY).unlink()
    (run / HISTORY).mkdir()
    manager.save(20, training.at(20)).result()
    with pytest.raises(UnseenFailure, match=f"cannot append to .*{HISTORY}"):
        manager.wait().result()
    assert manager.steps().result() == [20]


def test_on_error_warns_or_calls(opened: Opened, training: Training, run: Path) -> None:
    seen: list[BaseException] = []
    for on_error in ("warn", seen.append):
        system = FailingOS("mkdir")
        manager = opened(LocalPlace(run, posix=system), options=Options(on_error=on_error))
        system.suffix = "step_20"
        manager.save(20, training.at(20))
        if on_error == "warn":
            with pytest.warns(RuntimeWarning, match="nobody looked at"):
                manager.wait().result()
        else:
            manager.wait().result()
    assert len(seen) == 1 and isinstance(seen[0], OSError)


def test_what_failed_last_is_raised_at_close(opened: Opened, training: Training, run: Path) -> None:
    system = FailingOS("mkdir")
    manager = opened(LocalPlace(run, posix=system))
    system.suffix = "step_20"
    manager.save(20, training.at(20))
    with pytest.raises(UnseenFailure, match="step_20"):
        manager.close()
    manager.close()


def test_an_error_in_the_block_is_not_covered_by_one_at_its_end(opened: Opened, training: Training, run: Path) -> None:
    system = FailingOS("mkdir")
    with pytest.raises(ZeroDivisionError) as raised, opened(LocalPlace(run, posix=system)) as manager:
        system.suffix = "step_20"
        manager.save(20, training.at(20))
        raise ZeroDivisionError
    assert "closing the manager failed" in raised.value.__notes__[0]


@pytest.mark.parametrize(
    ("suffix", "number"), [(".safetensors", errno.ETIMEDOUT), (".json", errno.EMFILE), ("step_20", errno.ENOTCONN)]
)
def test_what_cannot_be_asked_for_now_is_not_taken_for_damaged(
    opened: Opened, training: Training, run: Path, suffix: str, number: int
) -> None:
    """An older checkpoint in its place would lose progress."""
    with opened() as manager:
        save_all(manager, training, 10, 20)
    system = FailingOS("scan" if suffix == "step_20" else "open", number)
    with opened(LocalPlace(run, posix=system)) as manager:
        system.suffix = suffix
        with pytest.raises(StorageUnavailable, match=re.escape(os.strerror(number))):
            manager.restore_latest(training.at(0)).result()
        system.suffix = None
        restored = manager.restore_latest(training.at(0)).result()
    assert restored is not None and restored.step == training.step == 20
