"""A run with a mirror: near by first, far away in the background, and back where the near place was lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncdcp import CheckpointManager, Options
from asyncdcp.errors import StorageError
from asyncdcp.runs import KeepLast, list_checkpoints
from asyncdcp.storage import LocalPlace, LocalStorage
from tests.manager.conftest import Training

Opened = Callable[..., CheckpointManager]


async def steps(place: Any) -> list[int]:
    return [checkpoint.step for checkpoint in await list_checkpoints(place) if checkpoint.good]


@pytest.fixture(params=["directory", "memory"])
def mirror(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "directory":
        return str(tmp_path / "mirror")
    return f"memory://{tmp_path.name}-{request.node.name.partition('[')[0]}/mirror"


async def test_what_is_committed_is_copied_and_each_place_keeps_its_own(
    opened: Opened, training: Training, run: Path, mirror: str
) -> None:
    manager = opened(keep=KeepLast(1), mirror=mirror, mirror_keep=KeepLast(2))
    for step in (1, 2, 3):
        await manager.save(step, training.at(step))
        await manager.wait()
    assert await steps(run) == [3]
    assert await steps(mirror) == [2, 3]
    reader = CheckpointManager(mirror, read_only=True, process=False)
    loaded = await reader.load(2)
    assert loaded["progress"] == {"step": 2}
    await reader.aclose()


async def test_closing_waits_for_the_copy(training: Training, run: Path, mirror: str) -> None:
    async with CheckpointManager(run, process=False, mirror=mirror, takeover_seconds=0.0) as manager:
        await manager.save(1, training.at(1))
    assert await steps(mirror) == [1]


async def test_a_run_that_was_lost_goes_on_from_its_mirror(
    opened: Opened, training: Training, run: Path, mirror: str
) -> None:
    manager = opened(mirror=mirror)
    for step in (1, 2):
        await manager.save(step, training.at(step))
    await manager.aclose()
    shutil.rmtree(run)
    again = opened(mirror=mirror)
    training.at(9)
    restored = await again.restore_latest(training.state)
    assert restored is not None and restored.step == training.step == 2
    await again.save(3, training.at(3))
    await again.wait()
    assert await steps(run) == [2, 3]
    assert await steps(mirror) == [1, 2, 3]


async def test_what_is_newer_near_by_is_not_undone(opened: Opened, training: Training, run: Path, mirror: str) -> None:
    manager = opened(mirror=mirror)
    for step in (1, 2, 3):
        await manager.save(step, training.at(step))
    await manager.restore(1, training.state)
    await manager.aclose()
    again = opened(mirror=mirror)
    restored = await again.restore_latest(training.state)
    assert restored is not None and restored.step == 1
    await again.save(2, training.at(20))
    await again.wait()
    assert await steps(mirror) == await steps(run) == [1, 2]


class _Broken(LocalStorage):
    """A place that cannot be written to."""

    broken = True

    async def create(self, name: str, length_hint: int) -> Any:
        if _Broken.broken:
            raise StorageError("the mirror is full", path=name)
        return await super().create(name, length_hint)


class _BrokenPlace(LocalPlace):
    def child(self, name: str) -> LocalStorage:
        return _Broken(super().child(name).info.location)


async def test_a_mirror_that_fails_fails_no_save_and_catches_up(
    opened: Opened, training: Training, run: Path, tmp_path: Path
) -> None:
    seen: list[BaseException] = []
    _Broken.broken = True
    manager = opened(mirror=_BrokenPlace(tmp_path / "far"), options=Options(on_error=seen.append))
    await manager.save(1, training.at(1))
    await manager.wait()
    assert await steps(run) == [1] and await steps(tmp_path / "far") == []
    assert seen and all("the mirror is full" in str(error) for error in seen)
    _Broken.broken = False
    await manager.save(2, training.at(2))
    await manager.wait()
    assert await steps(tmp_path / "far") == [1, 2]


async def test_a_copy_that_was_cut_off_is_begun_anew(
    opened: Opened, training: Training, run: Path, tmp_path: Path
) -> None:
    manager = opened()
    save_id = (await manager.save(1, training.at(1))).save_id
    far = LocalPlace(tmp_path / "far")
    for name in await LocalPlace(run).child("step_1").list():
        if name != f"{save_id}.json":
            writer = await far.child("step_1").create(name, 3)
            await writer.finish(3)
    await manager.aclose()
    again = opened(mirror=far)
    await again.wait()
    assert await steps(tmp_path / "far") == [1]
    reader = CheckpointManager(tmp_path / "far", read_only=True, process=False)
    assert (await reader.load(1))["progress"] == {"step": 1}
    await reader.aclose()


def test_a_mirror_is_checked_at_once(run: Path) -> None:
    for options in ({"mirror": ""}, {"mirror": 3}, {"mirror": "hdfs://x"}, {"mirror": "m", "mirror_keep": 3}):
        with pytest.raises(ValueError, match=r"target|mirror_keep"):
            CheckpointManager(run, process=False, **options)
