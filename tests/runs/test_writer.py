"""The one who writes to a run: terms, and what may be deleted when."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncdcp.errors import Fenced, StorageError
from asyncdcp.runs import KeepLast, settling
from asyncdcp.runs.writer import RunWriter
from asyncdcp.storage import LocalPlace, Place, Survey
from asyncdcp.storage.place import Selects
from asyncdcp.storage.posix import OS


async def test_nothing_is_deleted_for_the_sake_of_what_may_not_be_durable(place: Place, forge: Any) -> None:
    """The Record of step 3 can be seen; that it survives a loss of power is only sure once its save has resolved."""
    writer = RunWriter(place)
    await writer.open(quiet=0, deadline=0)
    await writer.go_on(None)
    for step in (1, 2, 3):
        await forge(place, step, term=1)
    gone = await writer.retain(KeepLast(1), await writer.look(), 2)
    assert [checkpoint.step for checkpoint in gone] == [1]
    assert (await writer.look()).steps() == [2, 3]
    assert [each.step for each in await writer.retain(KeepLast(1), await writer.look(), 3)] == [2]


async def test_each_writer_has_a_term_of_its_own(place: Place) -> None:
    first, second = RunWriter(place), RunWriter(place)
    await first.open(quiet=0, deadline=0)
    await second.open(quiet=0, deadline=0)
    assert (first.term, second.term) == (1, 2)
    with pytest.raises(Fenced, match="with term 2, and this one has term 1"):
        await first.look()
    await second.look()
    await second.go_on(None)
    await second.go_on(None)
    assert second.term == 3


async def test_a_run_that_cannot_be_claimed_names_the_way_to_read_it(tmp_path: Path) -> None:
    class ReadOnly(OS):
        def open(self, path: str, flags: int, /) -> int:
            raise OSError(errno.EROFS, "Read-only file system", path)

    with pytest.raises(StorageError, match=r"term_1.json: Read-only .*; a run that is only .* read_only=True"):
        await RunWriter(LocalPlace(tmp_path, posix=ReadOnly())).open(quiet=0, deadline=0)


async def test_what_moves_while_the_one_who_looks_is_stopped_is_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped in its second look, and finds in the third that the save has committed meanwhile."""
    save_id, looks, later = "0" * 20, list[int](), [0.0]

    class Stopped(LocalPlace):
        async def survey(self, selects: Selects, limit: int) -> Survey:
            looks.append(1)
            if len(looks) == 3:
                assert await self.child("step_1").claim(f"{save_id}.json", b"{}")
            found = await super().survey(selects, limit)
            later[0] += 100.0 * (len(looks) == 2)
            return found

    place, real = Stopped(tmp_path), time.monotonic
    writer = await place.child("step_1").create(f"{save_id}-0-0.safetensors", 0)
    await writer.finish(0)
    await place.storage.put("term_1.json", b"{}")
    clock = SimpleNamespace(monotonic=lambda: real() + later[0], time=time.time)
    monkeypatch.setattr(settling, "time", clock)
    settled = await settling.settle_saves(place, 1, quiet=60, deadline=1000)
    assert settled.committed == [("step_1", save_id)] and not settled.aborted
