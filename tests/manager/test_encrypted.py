"""Runs whose checkpoints are encrypted, Records and all: with the key everything works, without it nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

import asyncdcp
from asyncdcp import AESGCM, AsyncCheckpointer, CheckpointManager, EverySteps, ExtensionRegistry, KeepLast
from asyncdcp.errors import CheckpointNotFound, KeyUnavailable, UnsupportedFormat
from asyncdcp.extensions.aesgcm import key_name
from asyncdcp.runs import collect, list_checkpoints, look, plan_collection, read_history
from asyncdcp.runs.collection import delete_checkpoint
from asyncdcp.runs.history import open_history
from asyncdcp.runs.settling import abort_save
from asyncdcp.storage import LocalPlace
from tests.extensions.samples import Xor
from tests.manager.conftest import Training, save_all
from tests.manager.test_ranks import everywhere, save_some, state  # noqa: F401  # a fixture

Opened = Callable[..., CheckpointManager]
KEY, OTHER = bytes(range(32)), bytes(32)
REGISTRY = ExtensionRegistry([AESGCM(KEY)])


def sealed(key: bytes = KEY) -> dict[str, Any]:
    """The options of a manager that hides all that it can."""
    return {"extensions": [AESGCM(key, hide_metadata=True)]}


def names(run: Path) -> set[str]:
    """Every file of the run's steps."""
    return {str(path.relative_to(run)) for path in run.glob("step_*/*")}


def damage_record(step: Path) -> None:
    """Changes a few characters near the end."""
    (record,) = (path for path in step.glob("*.json") if "index" not in path.name)
    content = record.read_bytes()
    record.write_bytes(content[:-9] + b"AAAAAAA" + content[-2:])


def top(run: Path) -> list[str]:
    """What lies in the run's own directory, which need not be there."""
    return sorted(path.name for path in run.glob("*"))


@pytest.mark.parametrize("hidden", [False, True])
async def test_a_run_is_saved_kept_restored_followed_and_mirrored(
    opened: Opened, training: Training, run: Path, tmp_path: Path, *, hidden: bool
) -> None:
    options: dict[str, Any] = {"extensions": [asyncdcp.ZStandard(), AESGCM(KEY, hide_metadata=hidden)]}
    manager = opened(keep=KeepLast(2), mirror=tmp_path / "far", **options)
    for step in (1, 2, 3):
        await manager.save(step, training.at(step), metrics={"loss": 1 / step}, metadata={"note": "secret"})
        await manager.wait()
    assert await manager.steps() == [2, 3] and (await manager.best("loss")) == await manager.latest()
    await manager.aclose()

    again = opened(**options)
    latest = await again.restore_latest(training.at(0))
    assert latest is not None and (latest.step, training.step) == (3, 3)
    assert (latest.metrics, latest.metadata) == ({"loss": 1 / 3}, {"note": "secret"})
    assert (await again.restore(2, training.state)).step == training.step == 2
    save_all(again, training, 3)  # anew, in the place of the one that the rollback left behind
    assert await again.steps() == [2, 3]

    far = opened(tmp_path / "far", read_only=True, registry=REGISTRY)
    assert await far.steps() == [1, 2, 3] and (await far.load(1))["progress"] == {"step": 1}
    async with aclosing(asyncdcp.follow(run, **options)) as published:
        checkpoint = await anext(published)
        assert (checkpoint.step, (await checkpoint.load())["progress"]) == (3, {"step": 3})
    async with AsyncCheckpointer(process=False, **options) as checkpointer:
        assert (await checkpointer.verify(run / "step_3")).ok


async def test_the_history_hides_what_the_checkpoints_hide(opened: Opened, training: Training, run: Path) -> None:
    place = LocalPlace(run)
    save_all(opened(), training, 1, metrics={"loss": 1.0})
    save_all(opened(extensions=[AESGCM(KEY)]), training, 2, metrics={"loss": 0.5})
    save_all(opened(**sealed()), training, 3, metrics={"confidential": 0.25})
    assert b"confidential" not in (run / "history.jsonl").read_bytes()
    assert [(line.step, line.metrics) for line in await read_history(place, REGISTRY)] == [
        (1, {"loss": 1.0}),
        (2, {"loss": 0.5}),
        (3, {"confidential": 0.25}),
    ]
    for registry in (None, ExtensionRegistry([AESGCM(OTHER, key_id=key_name(KEY))])):
        saves, hidden = await open_history(place, registry)
        assert ([line.step for line in saves], hidden) == ([1, 2], 1)


async def test_whoever_lacks_the_key_neither_falls_back_nor_claims_anything(
    opened: Opened, training: Training, run: Path
) -> None:
    save_all(opened(), training, 1)
    save_all(opened(**sealed()), training, 2, 3)
    before = top(run)
    for options in ({}, sealed(OTHER)):
        with pytest.raises(KeyUnavailable, match=f"the latest .* is not known: step_3 may be it.*{key_name(KEY)}"):
            opened(**options)
    assert top(run) == before, "the run was claimed without its key"
    reader = opened(read_only=True)
    for look_at in (reader.checkpoints, reader.steps, reader.latest, lambda: reader.best("loss")):
        with pytest.raises(KeyUnavailable):
            await look_at()
    with pytest.raises(KeyUnavailable, match="is not known"):
        await reader.restore_latest(training.at(0))
    with pytest.raises(KeyUnavailable, match=r"step_2 of .* cannot be read"):
        await reader.load(2)
    with pytest.raises(CheckpointNotFound):
        await reader.load(4)
    assert (await reader.load(1))["progress"] == {"step": 1}
    async with aclosing(asyncdcp.follow(run)) as published:
        with pytest.raises(KeyUnavailable):
            await anext(published)


async def test_whoever_lacks_the_extension_does_not_fall_back(opened: Opened, training: Training, run: Path) -> None:
    save_all(opened(), training, 1)
    save_all(opened(extensions=[Xor()]), training, 2)
    with pytest.raises(UnsupportedFormat, match=r"step_2 cannot be read: .*by xor@tests/5a, which is not known here"):
        await opened().restore_latest(training.at(0))


async def test_another_key_of_the_same_name_is_no_damage(opened: Opened, training: Training, run: Path) -> None:
    save_all(opened(), training, 1)
    save_all(opened(extensions=[AESGCM(KEY, key_id="mine", hide_metadata=True)]), training, 2)
    wrong = AESGCM(OTHER, key_id="mine", hide_metadata=True)
    listed = await list_checkpoints(run, ExtensionRegistry([wrong]))
    assert [each.state for each in listed] == ["committed", "encrypted"]
    with pytest.raises(KeyUnavailable, match=r"step_2 may be it.*another key has the id 'mine'"):
        opened(extensions=[wrong])
    damage_record(run / "step_2")  # which it is with any key
    assert (await list_checkpoints(run, ExtensionRegistry([wrong])))[1].state == "damaged"


async def test_a_listing_shows_what_it_cannot_read(opened: Opened, training: Training, run: Path) -> None:
    save_all(opened(), training, 1)
    save_all(opened(**sealed()), training, 2)
    first, second = await list_checkpoints(run)
    assert (first.state, first.good) == ("committed", True)
    assert (second.state, second.good, second.metrics) == ("encrypted", False, {})
    assert second.size > 0 and second.cause is not None and key_name(KEY) in second.cause
    assert [each.state for each in await list_checkpoints(run, REGISTRY)] == ["committed"] * 2


async def test_the_key_may_come_from_the_environment(
    opened: Opened, training: Training, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(opened(**sealed()), training, 1)
    monkeypatch.setenv("ASYNCDCP_KEY", f"{OTHER.hex()},{KEY.hex()}")
    assert [each.state for each in await list_checkpoints(run)] == ["committed"]
    save_all(opened(**sealed(OTHER)), training, 2)  # a new key; the old one is there to read
    assert await opened(read_only=True).steps() == [1, 2]


async def test_nothing_encrypted_is_taken_away_without_the_key(opened: Opened, training: Training, run: Path) -> None:
    save_all(opened(**sealed()), training, 1, 2)
    place, there = LocalPlace(run), names(run)
    found = await look(place)
    save_id = found.checkpoints[0].save_id
    assert save_id is not None
    assert plan_collection(found, now=time.time() + 9, older_than=0, off_line=True) == []
    with pytest.raises(KeyUnavailable, match="is not deleted"):
        await delete_checkpoint(place, "step_1", save_id)
    assert not await abort_save(place, "step_1", save_id, cause="test")
    assert names(run) == there


async def test_what_a_key_has_left_is_kept_by_a_run_that_goes_on_in_clear(
    opened: Opened, training: Training, run: Path
) -> None:
    save_all(opened(**sealed()), training, 1)
    save_all(opened(registry=REGISTRY), training, 2)
    manager = opened(keep=KeepLast(1))  # without any key: the latest is in clear, and known
    save_all(manager, training, 3)
    listed = [(each.step, each.state) for each in await list_checkpoints(run)]
    assert listed == [(1, "encrypted"), (3, "committed")]
    with_key = await look(LocalPlace(run), registry=REGISTRY)
    assert with_key.steps() == [1, 3]


async def test_off_line_checkpoints_are_collected_with_the_key(opened: Opened, training: Training, run: Path) -> None:
    save_all(opened(**sealed()), training, 1, 2)
    manager = opened(**sealed())
    await manager.restore(1, training.state)
    await manager.aclose()
    place = LocalPlace(run)
    (leftover,) = plan_collection(
        await look(place, registry=REGISTRY), now=time.time() + 9, older_than=0, off_line=True
    )
    assert (leftover.kind, leftover.name) == ("off the line", "step_2")
    assert await collect(place, leftover, REGISTRY)
    assert not (run / "step_2").exists()


async def test_a_mirror_that_cannot_be_read_is_not_passed_over(opened: Opened, training: Training, run: Path) -> None:
    far = run.with_name("far")
    save_all(opened(far, **sealed()), training, 1)
    with pytest.raises(KeyUnavailable):
        opened(mirror=far)
    assert top(run) == []
    manager = opened(mirror=far, registry=REGISTRY)
    assert await manager.steps() == [1]


def test_two_ranks(everywhere: Callable[..., list[Any]], run: Path) -> None:  # noqa: F811  # the fixture
    options = {"save_when": EverySteps(3), "keep": KeepLast(2), **sealed()}
    assert everywhere(save_some, **options) == [[3, 6]] * 2

    def restore(rank: int, manager: CheckpointManager) -> Any:
        target = state(rank, 0)
        restored = manager.restore_latest(target).result()
        assert restored is not None
        return restored.step, float(target["weight"][0]), target["own"].value

    assert everywhere(restore, **sealed()) == [(6, 6.0, {"rank": rank, "step": 6}) for rank in range(2)]
    first, second = everywhere(restore)
    assert isinstance(first, KeyUnavailable) and "KeyUnavailable" in str(second)


@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize("fails", [1, 7, 8, 1000])
def test_a_key_that_cannot_be_had_for_a_while_is_no_damage(
    run: Path, opened: Opened, training: Training, hide: bool, fails: int
) -> None:
    """Else training would go on from an older checkpoint, since its provider answered once more by then."""
    left = 0

    def provider(_: str) -> bytes:
        nonlocal left
        left -= 1
        if left >= 0:
            raise ConnectionError("the key store is away")
        return KEY

    writer = opened(extensions=[AESGCM(KEY, key_id="mine", hide_metadata=hide)])
    save_all(writer, training, 1, 2)
    writer.close()
    left = fails
    try:
        manager = opened(extensions=[AESGCM(provider, key_id="mine", hide_metadata=hide)])
        restored = manager.restore_latest(training.state).result()
    except KeyUnavailable as error:
        assert "provider raised ConnectionError" in str(error)
    else:
        assert restored is not None and restored.step == 2 and fails < 1000
