"""Whenever a process is killed or power lost during saves and retention, there is a checkpoint, and every one that is
named can be loaded.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from asyncdcp import AsyncCheckpointer, CheckpointManager, KeepLast
from asyncdcp.runs import look
from asyncdcp.runs.saves import SaveView
from asyncdcp.storage import LocalPlace
from asyncdcp.testing.disk import Image, SimulatedDisk
from asyncdcp.testing.power import remains

RUN = "/runs/gpt"
LOST_AT_ONCE = 10
"""About so many outcomes of a loss of power are looked at after each call."""


class Recorder:
    """What a crash after each call would leave, and the newest step that somebody was told is durable by then."""

    def __init__(self) -> None:
        self.disk = SimulatedDisk({"/runs": None}, after=self._after)
        self.durable = -1
        self.recording = False
        self.images: dict[tuple[Any, ...], tuple[str, int, Image]] = {}

    def _after(self, operation: str, path: str) -> None:
        if not self.recording:
            return
        for image in (self.disk.image(), *remains(self.disk, LOST_AT_ONCE)):
            key = (self.durable, *sorted((name, hash(content)) for name, content in image.items()))
            self.images.setdefault(key, (f"{operation} {path}", self.durable, image))


def manager_on(disk: SimulatedDisk, keep: int = 2) -> CheckpointManager:
    place = LocalPlace(RUN, posix=disk)
    return CheckpointManager(place, keep=KeepLast(keep), process=False, takeover_seconds=0.0)


def state(step: int) -> dict[str, Any]:
    return {"weight": torch.full((32,), float(step)), "step": step}


@pytest.fixture(scope="module", params=["one after another", "at once"])
def crashes(request: pytest.FixtureRequest) -> list[tuple[str, int, Image]]:
    """All crashes of a run that is opened, restored, saves some more steps and lets some go: one at a time; or, keeping
    only the last, with several saves on their way.
    """
    at_once = request.param == "at once"
    recorder = Recorder()
    with manager_on(recorder.disk) as manager:
        for step in (10, 20):
            manager.save(step, state(step)).result()
    recorder.durable = 20
    recorder.recording = True
    with manager_on(recorder.disk, keep=1 if at_once else 2) as manager:
        restored = manager.restore_latest(state(0)).result()
        assert restored is not None
        for step in (30, 40, 50) if at_once else (30, 40):
            handle = manager.save(step, state(step))
            if not at_once:
                handle.result()
                recorder.durable = step
                manager.wait().result()
        manager.wait().result()
        assert manager.steps().result() == ([50] if at_once else [30, 40])
    recorder.recording = False
    return list(recorder.images.values())


async def test_what_is_named_can_be_loaded(crashes: list[tuple[str, int, Image]]) -> None:
    assert len(crashes) > 60
    async with AsyncCheckpointer(process=False) as checkpointer:
        for call, durable, image in crashes:
            place = LocalPlace(RUN, posix=SimulatedDisk(image))
            found = await look(place)
            steps = found.steps()
            assert steps, f"after {call}: nothing is left"
            assert steps[-1] >= durable, f"after {call}: {steps}, and step {durable} was durable"
            assert {each.state for each in found.checkpoints} <= {"committed", "partial", "aborted"}, call
            for checkpoint in found.good():
                assert checkpoint.save_id is not None
                storage = SaveView(place.child(checkpoint.name), checkpoint.save_id)
                loaded = await checkpointer.load(storage)
                assert loaded["step"] == checkpoint.step, call
                assert torch.equal(loaded["weight"], state(checkpoint.step)["weight"]), call


def test_the_next_writer_goes_on_from_there(crashes: list[tuple[str, int, Image]]) -> None:
    """It saves a step that may be there in part, and tidies up. A third of the crashes, since each takes a while."""
    for call, durable, image in crashes[::3]:
        disk = SimulatedDisk(image)
        target = state(0)
        with manager_on(disk) as manager:
            restored = manager.restore_latest(target).result()
            assert restored is not None and restored.step == target["step"] >= durable, call
            again = restored.step + 10
            manager.save(again, state(again)).result()
            manager.wait().result()
            assert manager.steps().result()[-2:] == [restored.step, again], call
        assert disk.open_files == []


def test_a_crash_while_it_recovers_is_no_worse(crashes: list[tuple[str, int, Image]]) -> None:
    call, durable, image = next(crash for crash in crashes[::-1] if "step_30" in crash[0] and "index" in crash[0])
    recorder = Recorder()
    recorder.disk = SimulatedDisk(image, after=recorder._after)
    recorder.recording, recorder.durable = True, durable
    with manager_on(recorder.disk) as manager:
        manager.restore_latest(state(0)).result()
    for again, _, left in recorder.images.values():
        with manager_on(SimulatedDisk(left)) as manager:
            latest = manager.latest().result()
        assert latest is not None and latest.step >= durable, f"{call}, then {again}"
