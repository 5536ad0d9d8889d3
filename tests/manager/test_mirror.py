"""A run with a mirror: near by first, far away in the background, and back where the near place was lost."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncdcp import CheckpointManager, Options, Telemetry
from asyncdcp.errors import CheckpointNotFound, ChecksumMismatch, StorageError
from asyncdcp.manager import Event
from asyncdcp.runs import KeepLast, list_checkpoints
from asyncdcp.storage import LocalPlace, LocalStorage, Survey
from asyncdcp.storage.place import Selects
from tests.manager.conftest import Training

Opened = Callable[..., CheckpointManager]


def lose(run: Path, names: str) -> None:
    for path in run.glob(names):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


async def a_run_of_two_steps(manager: CheckpointManager, training: Training) -> None:
    for step in (1, 2):
        await manager.save(step, training.at(step))
        await manager.wait()
    await manager.aclose()


async def steps(place: Any) -> list[int]:
    return [checkpoint.step for checkpoint in await list_checkpoints(place) if checkpoint.good]


def flip(run: Path, names: str) -> None:
    """The last byte of each of these files."""
    for path in run.glob(names):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


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
    await a_run_of_two_steps(opened(mirror=mirror), training)
    shutil.rmtree(run)
    again = opened(mirror=mirror)
    training.at(9)
    restored = await again.restore_latest(training.state)
    assert restored is not None and restored.step == training.step == 2
    await again.save(3, training.at(3))
    await again.wait()
    assert await steps(run) == [2, 3]
    assert await steps(mirror) == [1, 2, 3]


@pytest.mark.parametrize("lost", ["*.safetensors", "*.index.json"])
async def test_a_newest_checkpoint_that_has_lost_files_is_fetched_whole(
    opened: Opened, training: Training, run: Path, mirror: str, lost: str
) -> None:
    await a_run_of_two_steps(opened(mirror=mirror), training)
    for path in (run / "step_2").glob(lost):
        os.truncate(path, 100)
    again = opened(mirror=mirror)
    restored = await again.restore_latest(training.at(9))
    assert restored is not None and restored.step == training.step == 2


@pytest.mark.parametrize(("damaged", "step"), [("*.safetensors", None), ("*.index.json", 2)])
async def test_one_that_turns_out_damaged_as_it_is_loaded_is_taken_from_the_mirror(
    opened: Opened, training: Training, run: Path, tmp_path: Path, damaged: str, step: int | None
) -> None:
    mirror = tmp_path / "mirror"
    await a_run_of_two_steps(opened(mirror=mirror), training)
    flip(run, f"step_2/{damaged}")
    events: list[Event] = []
    again = opened(mirror=mirror, telemetry=Telemetry(on_event=events.append))
    training.at(9)
    restored = await (again.restore_latest(training.state) if step is None else again.restore(step, training.state))
    assert restored is not None and restored.step == training.step == 2
    assert (await again.load(2))["progress"] == {"step": 2}  # it is whole near by again
    await again.save(3, training.at(3))
    await again.aclose()
    assert await steps(run) == await steps(mirror) == [1, 2, 3]
    assert again._engine._callbacks.join(10)
    told = [event for event in events if event.kind in ("fetched", "fallback")]
    assert [event.step for event in told] == [2] and "cannot be loaded" in told[0].fields["cause"]


async def test_where_the_mirrors_copy_is_damaged_too_the_one_near_by_stays_and_an_older_one_is_loaded(
    opened: Opened, training: Training, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    far = tmp_path / "far"
    await a_run_of_two_steps(opened(mirror=far), training)
    flip(run, "step_2/*.safetensors")
    flip(far, "step_2/*.safetensors")
    before = {path.name: path.read_bytes() for path in (run / "step_2").iterdir()}
    again = opened(mirror=far)
    with pytest.raises(ChecksumMismatch):
        await again.restore(2, training.state)
    assert "an older one is tried" not in caplog.text
    restored = await again.restore_latest(training.at(9))
    assert restored is not None and restored.step == training.step == 1
    assert {path.name: path.read_bytes() for path in (run / "step_2").iterdir()} == before
    assert re.search(
        r"nothing is fetched from .*far: .*step_2 is damaged, too: .*does not match its checksum", caplog.text
    )
    assert "step 2 cannot be restored, an older one is tried" in caplog.text


class _Unreadable(LocalStorage):
    """Its data cannot be read, whoever wrote it."""

    async def open(self, name: str) -> Any:
        if name.endswith(".safetensors"):
            raise StorageError("a bad sector", path=name)
        return await super().open(name)


class _UnreadablePlace(LocalPlace):
    def child(self, name: str) -> LocalStorage:
        storage = super().child(name)
        return _Unreadable(storage.info.location) if name == "step_2" else storage


async def test_what_cannot_be_loaded_though_it_was_fetched_is_passed_over(
    opened: Opened, training: Training, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await a_run_of_two_steps(opened(mirror=tmp_path / "far"), training)
    restored = await opened(_UnreadablePlace(run), mirror=tmp_path / "far").restore_latest(training.at(9))
    assert restored is not None and restored.step == training.step == 1
    assert caplog.text.count("step 2 is being fetched") == 1 and "step 2 cannot be restored" in caplog.text


async def test_what_is_left_near_by_goes_only_for_a_copy_that_is_whole(
    opened: Opened, training: Training, run: Path, tmp_path: Path
) -> None:
    """And then the newest that the mirror has whole is fetched."""
    far = tmp_path / "far"
    await a_run_of_two_steps(opened(mirror=far), training)
    flip(far, "step_2/*.safetensors")
    lose(run, "step_2/*.safetensors")
    lose(run, "step_1")
    left = {path.name for path in (run / "step_2").iterdir()}
    restored = await opened(mirror=far).restore_latest(training.at(9))
    assert restored is not None and restored.step == training.step == 1
    assert {path.name for path in (run / "step_2").iterdir()} == left


async def test_the_mirrors_older_ones_are_tried_before_there_is_nothing(
    opened: Opened, training: Training, run: Path, tmp_path: Path
) -> None:
    far = tmp_path / "far"
    await a_run_of_two_steps(opened(mirror=far, keep=KeepLast(1)), training)
    assert await steps(run) == [2]
    for place in (run, far):
        flip(place, "step_2/*.safetensors")
    restored = await opened(mirror=far).restore_latest(training.at(9))
    assert restored is not None and restored.step == training.step == 1


async def test_a_step_that_only_the_mirror_keeps_can_be_gone_back_to(
    opened: Opened, training: Training, run: Path, tmp_path: Path
) -> None:
    manager = opened(mirror=tmp_path / "far", keep=KeepLast(1))
    for step in (1, 2, 3):
        await manager.save(step, training.at(step))
        await manager.wait()
    with pytest.raises(CheckpointNotFound, match="no checkpoint of step 4"):
        await manager.restore(4, training.state)
    restored = await manager.restore(2, training.state)
    assert restored.step == training.step == 2
    assert await steps(run) == [2]


@pytest.mark.parametrize("lost", ["step_*", "step_2/*.safetensors"])
async def test_a_start_that_saved_nothing_keeps_no_checkpoint_from_being_fetched(
    opened: Opened, training: Training, run: Path, mirror: str, lost: str
) -> None:
    """It has claimed a term of which the mirror does not know."""
    await a_run_of_two_steps(opened(mirror=mirror), training)
    crashed = opened(mirror=mirror)
    await crashed.restore_latest(training.state)
    await crashed.aclose()
    lose(run, lost)
    restored = await opened(mirror=mirror).restore_latest(training.at(9))
    assert restored is not None and restored.step == training.step == 2


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


class _Away(LocalPlace):
    """A place that does not answer."""

    async def survey(self, selects: Selects, limit: int) -> Survey:
        raise StorageError("it does not answer", path="far")


class _AwayInTheMiddle(LocalPlace):
    """One that answers no more once its checkpoints are known."""

    def child(self, name: str) -> LocalStorage:
        raise StorageError("it does not answer", path="far")


@pytest.mark.parametrize("away", [_Away, _AwayInTheMiddle])
async def test_a_run_that_was_lost_does_not_begin_anew_while_its_mirror_is_away(
    opened: Opened, training: Training, run: Path, tmp_path: Path, away: type[LocalPlace]
) -> None:
    far, lost = tmp_path / "far", "has no checkpoint, and what its mirror .* it does not answer.* leave mirror= out"
    async with CheckpointManager(run, process=False, mirror=far, takeover_seconds=0.0) as manager:
        await manager.save(1, training.at(1))
    shutil.rmtree(run)
    again = CheckpointManager(run, process=False, mirror=away(far), takeover_seconds=0.0)
    with pytest.raises(StorageError, match=lost):
        await again.restore_latest(training.state)
    await again.aclose()
    restored = await opened(mirror=far).restore_latest(training.at(9))
    assert restored is not None and restored.step == training.step == 1


async def test_a_run_that_is_there_goes_on_while_its_mirror_is_away(
    training: Training, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with CheckpointManager(run, process=False) as manager:
        await manager.save(1, training.at(1))
    again = CheckpointManager(run, process=False, mirror=_Away(tmp_path / "far"), takeover_seconds=0.0)
    restored = await again.restore_latest(training.state)
    assert restored is not None and restored.step == 1
    await again.aclose()
    assert "it does not answer" in caplog.text


async def test_damage_is_passed_over_while_the_mirror_is_away(
    opened: Opened, training: Training, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await a_run_of_two_steps(opened(mirror=tmp_path / "far"), training)
    flip(run, "step_2/*.safetensors")
    before = {path.name for path in (run / "step_2").iterdir()}
    again = opened(mirror=_AwayInTheMiddle(tmp_path / "far"))
    restored = await again.restore_latest(training.at(9))
    assert restored is not None and restored.step == training.step == 1
    assert "it does not answer" in caplog.text and "step 2 cannot be restored" in caplog.text
    assert {path.name for path in (run / "step_2").iterdir()} == before


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
    link = run.parent / "link"
    link.symlink_to(run)
    for mirror, keep in (("", None), (3, None), ("hdfs://x", None), (link, None), ("m", 3)):
        with pytest.raises(ValueError, match=r"target|mirror_keep|is the run's own"):
            CheckpointManager(run, process=False, mirror=mirror, mirror_keep=keep)  # type: ignore[arg-type]  # on purpose
