"""verify through the checkpointer: a report, progress, a deadline, both twins."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
import torch

from asyncdcp import AsyncCheckpointer, MemoryStorage, Options, Progress, SyncCheckpointer, VerifyReport
from asyncdcp.errors import AsyncDCPError, Cancelled, CheckpointNotFound, DeadlineExceeded
from asyncdcp.storage import ObjectReader


def damage(path: Path) -> str:
    data = next(path.glob("*.safetensors"))
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    return data.name


async def test_a_report_with_progress(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
    steps: list[Progress] = []
    over = threading.Event()

    def progress(step: Progress) -> None:  # on a thread of its own, which the report does not wait for
        steps.append(step)
        if step.done == step.total:
            over.set()

    await checkpointer.save(tmp_path, {"w": torch.randn(5_000_000), "b": torch.ones(3)})
    report: VerifyReport = await checkpointer.verify(tmp_path, on_progress=progress)
    assert await anyio.to_thread.run_sync(over.wait, 60)
    assert report.ok and report.bytes == steps[-1].total == steps[-1].done
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    name = damage(tmp_path)
    report = await checkpointer.verify(tmp_path)
    assert not report.ok
    assert [(one.file, one.kind, one.tensors) for one in report.damages] == [(name, "checksum", ("w", "b"))]


def test_the_blocking_twin_and_what_is_not_there(tmp_path: Path) -> None:
    with SyncCheckpointer(process=False) as checkpointer:
        checkpointer.save(tmp_path / "a", {"w": torch.ones(3)})
        assert checkpointer.verify(tmp_path / "a").ok
        with pytest.raises(CheckpointNotFound):
            checkpointer.verify(tmp_path / "b")


class Slow(MemoryStorage):
    async def open(self, name: str) -> ObjectReader:  # type: ignore[override]  # never returns
        await anyio.sleep_forever()
        raise AssertionError


class Cancelling(MemoryStorage):
    async def open(self, name: str) -> ObjectReader:  # type: ignore[override]  # never returns
        raise asyncio.CancelledError


def test_a_storage_that_cancels_by_itself_has_not_read() -> None:
    storage = Cancelling()
    with AsyncCheckpointer(process=False) as checkpointer:
        checkpointer.save(storage, {"w": torch.ones(3)}).result()
        for future in (checkpointer.load(storage), checkpointer.verify(storage)):
            with pytest.raises(AsyncDCPError, match="nobody had asked for it"):
                future.result()


def test_its_deadline_and_its_end() -> None:
    storage = Slow()
    with AsyncCheckpointer(Options(load_deadline=0.1), process=False) as checkpointer:
        checkpointer.save(storage, {"w": torch.ones(3)}).result()
        with pytest.raises(DeadlineExceeded, match="the verify of memory was not done within"):
            checkpointer.verify(storage).result()
    with AsyncCheckpointer(process=False) as checkpointer:
        future = checkpointer.verify(storage)
        future.cancel()
        with pytest.raises(Cancelled):
            future.result()
