"""A mirror beside a run that is open: what is copied stays, what cannot be is told, what is lost comes back, and nobody
gives up too early.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from anyio import to_thread

from asyncdcp import CheckpointManager, KeepLast, Telemetry
from asyncdcp.errors import Fenced
from asyncdcp.extensions import ExtensionRegistry
from asyncdcp.manager import Event
from asyncdcp.manager.mirror import Mirror
from asyncdcp.manager.session import FETCH_DEADLINE, RunSession, Standing
from asyncdcp.manager.telemetry import Reporter
from asyncdcp.ranks import SoleRank
from asyncdcp.runs import list_checkpoints
from asyncdcp.storage import LocalPlace, LocalStorage
from tests.manager.conftest import Opened, Training


async def steps(place: Path) -> list[int]:
    return [checkpoint.step for checkpoint in await list_checkpoints(place) if checkpoint.good]


def lose(run: Path, files: str) -> None:
    for path in run.glob(files):
        path.unlink()


class Slow(LocalPlace):
    """A place where nothing is written until it is told to go on; ``reached`` once something is to be."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reached, self.goes_on = threading.Event(), threading.Event()

    def child(self, name: str) -> LocalStorage:
        storage, place = super().child(name), self

        class Waiting(LocalStorage):
            async def create(self, name: str, length_hint: int) -> Any:
                place.reached.set()
                assert await to_thread.run_sync(place.goes_on.wait, 30)
                return await super().create(name, length_hint)

        return Waiting(storage.info.location)


async def test_what_is_being_copied_is_not_deleted_near_by(
    opened: Opened, training: Training, run: Path, tmp_path: Path
) -> None:
    """Else a mirror that takes longer than a checkpoint is kept would never have one."""
    far = Slow(tmp_path / "far")
    manager = opened(mirror=far, keep=KeepLast(1))
    await manager.save(1, training.at(1))
    assert await to_thread.run_sync(far.reached.wait, 30)
    await manager.save(2, training.at(2))
    await manager._engine.submit(manager._saves.settle)
    assert await steps(run) == [1, 2]
    far.goes_on.set()
    await manager.wait()
    await manager.save(3, training.at(3))
    await manager.wait()
    assert await steps(run) == [3]
    assert await steps(tmp_path / "far") == [1, 2, 3]


async def test_what_was_deleted_before_it_was_copied_is_told(
    opened: Opened, training: Training, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    far = Slow(tmp_path / "far")
    manager = opened(mirror=far)
    await manager.save(1, training.at(1))
    assert await to_thread.run_sync(far.reached.wait, 30)
    shutil.rmtree(run / "step_1")
    far.goes_on.set()
    await manager.wait()
    assert f"step 1 is not copied to {tmp_path / 'far'}: it was deleted in {run} before" in caplog.text


async def test_what_was_deleted_before_it_could_be_copied_anew_is_told(
    opened: Opened, training: Training, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    far = Slow(tmp_path / "far")
    far.goes_on.set()
    manager = opened(mirror=far)
    for step in (1, 2):
        await manager.save(step, training.at(step))
        await manager.wait()
    lose(tmp_path / "far", "step_*/*.safetensors")
    far.goes_on.clear()
    far.reached.clear()
    await manager.save(3, training.at(3))
    assert await to_thread.run_sync(far.reached.wait, 30)
    shutil.rmtree(run / "step_1")
    far.goes_on.set()
    await manager.wait()
    assert await steps(tmp_path / "far") == [2, 3]
    assert f"step 1 is not copied to {tmp_path / 'far'}: it was deleted in {run} before" in caplog.text


async def test_what_the_mirror_has_lost_files_of_is_copied_anew(
    opened: Opened, training: Training, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """But what is left there stays where the near one is damaged, too."""
    far = tmp_path / "far"
    manager = opened(mirror=far)
    for step in (1, 2):
        await manager.save(step, training.at(step))
    await manager.wait()
    for step in (1, 2):
        for path in (far / f"step_{step}").glob("*.safetensors"):
            path.unlink()
    for path in (run / "step_1").glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    await manager.wait()
    assert await steps(far) == [2]
    assert f"step 1 is damaged in {far}, and stays so" in caplog.text
    assert [path.name for path in (far / "step_1").glob("*.index.json")]


@pytest.mark.parametrize("lost", ["step_2/*.safetensors", "step_*/*.safetensors"])
async def test_what_has_lost_files_since_the_run_was_opened_is_fetched(
    opened: Opened, training: Training, run: Path, tmp_path: Path, lost: str
) -> None:
    events: list[Event] = []
    manager = opened(mirror=tmp_path / "far", telemetry=Telemetry(on_event=events.append))
    for step in (1, 2):
        await manager.save(step, training.at(step))
        await manager.wait()
    lose(run, lost)
    restored = await manager.restore_latest(training.at(9))
    assert restored is not None and restored.step == training.step == 2
    await manager.aclose()
    assert manager._engine._callbacks.join(10)
    assert [(event.kind, event.step) for event in events if event.kind in ("fetched", "fallback")] == [("fetched", 2)]


async def test_who_is_cancelled_leaves_the_round_to_those_who_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = Mirror(LocalPlace(tmp_path / "near"), LocalPlace(tmp_path / "far"), None)
    left = iter(range(3))
    begun, ends = ([asyncio.Event() for _ in range(3)] for _ in range(2))

    async def a_round() -> list[Any]:
        number = next(left)
        begun[number].set()
        await ends[number].wait()
        return []

    monkeypatch.setattr(mirror, "_round", a_round)
    first, second = (asyncio.create_task(mirror.follow()) for _ in range(2))
    await begun[0].wait()
    assert mirror._wanted  # the second waits for another round of the first
    ends[0].set()
    await begun[1].wait()
    first.cancel()
    ends[2].set()
    await second
    assert begun[2].is_set() and first.cancelled()


async def test_a_writer_that_was_replaced_leaves_the_mirror_to_the_other(
    opened: Opened, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened(mirror=tmp_path / "far")
    await manager.save(1, training.at(1))
    await manager.wait()
    opened(mirror=tmp_path / "far")
    await manager.save(2, training.at(2))
    await manager._engine.submit(manager._saves.settle)
    followed: list[bool] = []

    async def follow() -> None:
        followed.append(True)

    monkeypatch.setattr(manager._session, "follow", follow)
    with pytest.raises(Fenced):
        await manager.wait()
    with pytest.raises(Fenced):
        await manager.aclose()
    assert not followed


async def test_the_other_ranks_wait_as_long_as_fetching_may_take(tmp_path: Path) -> None:
    waited: list[float | None] = []

    class Second(SoleRank):
        rank, world_size = 1, 2

        async def decide(
            self, topic: str, told: bytes, decide: Callable[[Sequence[bytes]], bytes], *, deadline: float | None = None
        ) -> bytes:
            waited.append(deadline)
            return msgspec.json.encode(Standing(term=3))

    near, far, registry = LocalPlace(tmp_path / "near"), LocalPlace(tmp_path / "far"), ExtensionRegistry()
    manager = CheckpointManager(tmp_path / "near", process=False, read_only=True)
    session = RunSession(near, Second(), Reporter(None, "near", manager._engine), None, 0.0, registry)
    session.mirror = Mirror(near, far, None)
    await session.open()
    assert waited == [FETCH_DEADLINE] and session.standing.term == 3
    await manager.aclose()
