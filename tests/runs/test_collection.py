"""What is of no use is found by the plan, and taken away without tearing anything."""

from __future__ import annotations

import time
from typing import Any

import pytest

from asyncdcp.envelope import decode_record
from asyncdcp.metadata import RECORD_LIMIT
from asyncdcp.names import data_name, record_name
from asyncdcp.runs import collect, look, plan_collection
from asyncdcp.runs.collection import delete_checkpoint, total
from asyncdcp.storage import LocalPlace, Place


async def kinds(place: Place, **options: Any) -> list[tuple[str, str]]:
    plan = plan_collection(await look(place), now=time.time() + 1, older_than=0.0, **options)
    return [(leftover.kind, leftover.name) for leftover in plan]


@pytest.fixture
async def messy(place: Place, forge: Any, claim: Any) -> Place:
    """A run with one of everything."""
    await claim(place, 1, {})
    await forge(place, 10, term=1)
    await forge(place, 20, term=1)
    await forge(place, 30, term=1)
    await forge(place, 40, term=1, outcome=None)
    await forge(place, 50, term=1, outcome="abort", cause="failed")
    await claim(place, 2, {1: 20})
    old = await forge(place, 60, term=1)
    await forge(place, 60, term=2, replaces=[old])
    return place


async def test_the_plan_names_what_is_left_over(messy: Place) -> None:
    assert await kinds(messy) == [("dead save", "step_40"), ("given-up save", "step_50"), ("replaced", "step_60")]
    assert ("off the line", "step_30") in await kinds(messy, off_line=True)
    plan = plan_collection(await look(messy), now=time.time() + 1, older_than=0.0)
    assert total(plan) == sum(leftover.size for leftover in plan) > 450


async def test_what_is_young_is_left_alone(messy: Place) -> None:
    assert plan_collection(await look(messy), now=time.time(), older_than=60.0, off_line=True) == []


async def test_collecting_leaves_what_counts(messy: Place) -> None:
    before = (await look(messy)).good()
    for _ in range(2):  # what a dead save leaves is the abort that it was collected by
        for leftover in plan_collection(await look(messy), now=time.time() + 1, older_than=0.0, off_line=True):
            assert await collect(messy, leftover)
    run = await look(messy)
    assert run.good() == before and [each.step for each in run.checkpoints] == [10, 20, 60]
    assert sorted(name for name in run.survey.children if name.startswith("step_")) == ["step_10", "step_20", "step_60"]
    assert await kinds(messy, off_line=True) == []


async def test_a_save_that_committed_after_all_is_kept(place: Place, forge: Any) -> None:
    await forge(place, 1, outcome=None)
    (plan,) = plan_collection(await look(place), now=time.time() + 1, older_than=0.0)
    late = await forge(place, 2)
    storage = place.child("step_1")
    record = await place.child("step_2").get(record_name(late), RECORD_LIMIT)
    assert plan.save_id is not None
    from msgspec.structs import replace

    from asyncdcp.envelope import encode_record

    committed = replace(decode_record(record, "it"), save_id=plan.save_id)
    assert await storage.claim(record_name(plan.save_id), encode_record(committed))
    files = await storage.list()
    assert not await collect(place, plan)
    assert await storage.list() == files


async def test_a_dead_save_that_is_collected_can_not_commit_any_more(place: Place, forge: Any) -> None:
    save_id = await forge(place, 1, outcome=None)
    (plan,) = plan_collection(await look(place), now=time.time() + 1, older_than=0.0)
    assert await collect(place, plan)
    assert not await place.child("step_1").claim(record_name(save_id), b"late")
    assert list(await place.child("step_1").list()) == [record_name(save_id)]


async def test_temporaries_and_empty_places_go(tmp_path: Any, forge: Any) -> None:
    place = LocalPlace(tmp_path)
    save_id = await forge(place, 1)
    (tmp_path / "step_1" / f".{save_id}.json.0123456789abcdef").write_bytes(b"half")
    (tmp_path / "step_2").mkdir()
    assert await kinds(place) == [("temporaries", "step_1"), ("empty", "step_2")]
    for leftover in plan_collection(await look(place), now=time.time() + 1, older_than=0.0):
        await collect(place, leftover)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    assert sorted((await look(place)).steps()) == [1]


async def test_what_others_have_put_there_is_left_alone(tmp_path: Any) -> None:
    """torch.distributed.checkpoint keeps what describes a checkpoint in a file with a leading dot."""
    place = LocalPlace(tmp_path)
    (tmp_path / "step_9").mkdir()
    for name in (".metadata", "__0_0.distcp", ".gitkeep"):
        (tmp_path / "step_9" / name).write_bytes(b"somebody's")
    assert await kinds(place, off_line=True) == []


async def test_deleting_takes_what_was_replaced_first_and_leaves_aborts(place: Place, forge: Any) -> None:
    old = await forge(place, 1, attempt=1)
    aborted = await forge(place, 1, attempt=2, outcome="abort", cause="failed")
    new = await forge(place, 1, attempt=3, replaces=[old])
    await delete_checkpoint(place, "step_1", new)
    assert sorted(await place.child("step_1").list()) == sorted(
        [record_name(aborted), data_name(aborted, 0, 0), f"{aborted}-0.index.json"]
    )
    await delete_checkpoint(place, "step_1", new)
    await delete_checkpoint(place, "step_7", new)
