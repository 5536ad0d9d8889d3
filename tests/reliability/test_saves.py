"""Every call of a whole save fails once: the future says so, the old checkpoint stays, the next save works."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from asyncdcp.storage.local_writer import LocalWriter
from asyncdcp.storage.port import Buffer
from tests.reliability.saves import sweep, sweep_worker
from tests.reliability.worlds import Lost


@pytest.mark.parametrize("kind", ["EIO", "MemoryError"])  # the others in the long run
def test_one_call_fails(kind: str) -> None:
    assert sweep(kind) > 40


def test_one_call_of_the_worker_fails(tmp_path: Path) -> None:
    sweep_worker(tmp_path, cases=15, seed=1)


def test_a_file_that_stays_open_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def abort(_: LocalWriter) -> None: ...

    monkeypatch.setattr(LocalWriter, "abort", abort)
    with pytest.raises(Lost, match="left open"):
        sweep("EIO")


def test_an_error_that_is_not_told_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: LocalWriter, offset: int, buffer: Buffer) -> None:
        with suppress(OSError):
            whole(self, offset, buffer)

    whole = LocalWriter._write_all
    monkeypatch.setattr(LocalWriter, "_write_all", write)
    with pytest.raises(Lost, match="a load fails"):
        sweep("EIO")
