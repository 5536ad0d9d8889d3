"""What a save and a load tell while they go on, and the warning that comes before."""

from __future__ import annotations

import contextvars
import threading
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import pytest
import torch

from asyncdcp import AsyncCheckpointer, MemoryStorage, Progress
from asyncdcp.errors import (
    VolatileStorageWarning,
)
from tests.checkpointer.conftest import Opened

MIB = 1 << 20


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
