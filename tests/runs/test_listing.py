"""What a run looks like from names, sizes and Records."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from asyncdcp.envelope import Seal, encode_record
from asyncdcp.errors import CorruptCheckpoint, InvalidOption, KeyUnavailable
from asyncdcp.metadata import Record
from asyncdcp.names import data_name, index_name, record_name
from asyncdcp.runs import list_checkpoints, look, plan_collection
from asyncdcp.runs.layout import line_name, step_name, step_of
from asyncdcp.runs.listing import Known
from asyncdcp.storage import LocalPlace, Place


async def states(place: Place) -> list[tuple[int, str]]:
    return [(checkpoint.step, checkpoint.state) for checkpoint in await list_checkpoints(place)]


async def test_each_state_is_told(place: Place, forge: Any) -> None:
    await forge(place, 10, metrics={"loss": 2.5}, metadata={"note": "first"})
    await forge(place, 20, outcome=None)
    await forge(place, 30, outcome="abort", rank=3, cause="failed: no space")
    await forge(place, 40)
    await place.child("step_40").delete([name for name in await place.child("step_40").list() if "safetensors" in name])
    await place.child("notes").put("readme", b"not a step")
    assert await states(place) == [(10, "committed"), (20, "partial"), (30, "aborted"), (40, "damaged")]
    first, _, given_up, damaged = await list_checkpoints(place)
    assert (first.metrics, first.metadata, first.size > 150, first.ranks) == ({"loss": 2.5}, {"note": "first"}, True, 1)
    assert given_up.cause == "rank 3: failed: no space"
    assert damaged.cause == "100 bytes of its data files are missing"


async def test_a_run_that_is_not_there_has_no_checkpoints(tmp_path: Path) -> None:
    assert await list_checkpoints(tmp_path / "nothing") == []


async def test_damage_is_named(place: Place, forge: Any) -> None:
    save_id = await forge(place, 1)
    await place.child("step_1").delete([index_name(save_id, 0)])
    broken = await forge(place, 2)
    storage = place.child("step_2")
    await storage.delete([record_name(broken)])
    await storage.put(record_name(broken), b'{"format":"asyncdcp"')
    await forge(place, 3, attempt=1)
    await forge(place, 3, attempt=2)
    causes = [checkpoint.cause or "" for checkpoint in await list_checkpoints(place)]
    assert causes[0] == f"{save_id}-0.index.json is missing"
    assert "not a JSON envelope" in causes[1]
    assert all("do not know of each other" in cause for cause in causes[2:])
    assert (await look(place)).latest() is None


async def test_a_save_that_was_replaced_is_not_listed(place: Place, forge: Any) -> None:
    old = await forge(place, 1)
    new = await forge(place, 1, term=2, replaces=[old])
    assert [checkpoint.save_id for checkpoint in await list_checkpoints(place)] == [new]


async def test_best_passes_over_what_is_no_number(place: Place, forge: Any) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 1.0), (5, 9.0)):
        await forge(place, step, metrics={"loss": loss})
    run = await look(place)
    assert [run.best("loss"), run.best("loss", "max")] == [run.find(4), run.find(5)]
    assert run.best("accuracy") is None
    with pytest.raises(InvalidOption, match="mode takes"):
        run.best("loss", "least")  # type: ignore[arg-type]  # on purpose


async def test_a_second_look_reads_only_what_is_new(place: Place, forge: Any) -> None:
    await forge(place, 1)
    known = Known()
    before = await look(place, known)
    assert not known.selects("step_1", record_name(before.checkpoints[0].save_id or ""))
    await forge(place, 2)
    assert [*before.checkpoints, *(await look(place)).checkpoints[1:]] == list((await look(place, known)).checkpoints)


async def test_a_damaged_record_that_was_replaced_is_read_anew(place: Place, forge: Any) -> None:
    name = record_name(await forge(place, 1))
    storage, known = place.child("step_1"), Known()
    record = await storage.get(name, 1 << 20)
    for data, state in ((record[:-9], "damaged"), (record, "committed")):
        await storage.delete([name])
        await storage.put(name, data)
        assert [each.state for each in (await look(place, known)).checkpoints] == [state]


async def test_a_line_that_cannot_be_read_is_not_guessed(place: Place, forge: Any, claim: Any) -> None:
    await forge(place, 1)
    await claim(place, 1, {})
    await place.storage.put(line_name(2), b"{}")
    with pytest.raises(CorruptCheckpoint, match=rf"^{place.storage.info.location}/line_2\.json"):
        await look(place)


def test_names_of_steps() -> None:
    assert [step_of(name) for name in ("step_7", "step_007", "step_", "step_-1", "step_1.5", "astep_1")] == [
        7, 7, None, None, None, None,
    ]  # fmt: skip
    assert step_name(100) == "step_100"
    for wrong in (-1, True, 1.0, "1"):
        with pytest.raises(InvalidOption, match="whole number"):
            step_name(wrong)  # type: ignore[arg-type]  # on purpose


@pytest.fixture
async def thousand(tmp_path: Path, forge: Any, claim: Any) -> Path:
    place = LocalPlace(tmp_path)
    await claim(place, 1, {})
    save_id = await forge(place, 0)
    names = (record_name(save_id), index_name(save_id, 0), data_name(save_id, 0, 0))
    files = {name: (tmp_path / "step_0" / name).read_bytes() for name in names}
    for step in range(1, 1000):
        (tmp_path / f"step_{step}").mkdir()
        for name, data in files.items():
            (tmp_path / f"step_{step}" / name).write_bytes(data)
    return tmp_path


def test_a_thousand_checkpoints_are_listed_without_torch(thousand: Path) -> None:
    code = f"""
import asyncio, sys
from asyncdcp.runs import list_checkpoints
found = asyncio.run(list_checkpoints({str(thousand)!r}))
assert "torch" not in sys.modules
assert [(each.step, each.state) for each in found] == [(step, "committed") for step in range(1000)], found[:3]
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("by", ["encrypt.aesgcm/1.somebodys", "encrypt.aesgcm/1.a+b", "secret@elsewhere/7"])
async def test_a_record_that_nobody_here_can_open_spoils_no_listing(
    place: Place, forge: Any, claim: Any, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ASYNCDCP_KEY", raising=False)
    await claim(place, 1, {})
    await forge(place, 1)
    save_id = await forge(place, 2, outcome=None)
    record = Record(save_id=save_id, outcome="commit", time=0.0, world_size=1, versions={})
    data = encode_record(record, lambda body, _: (Seal(by, "", True), body))  # the seal's own field
    await place.child("step_2").put(record_name(save_id), data)
    run = await look(place)
    assert [(each.step, each.state) for each in run.checkpoints] == [(1, "committed"), (2, "encrypted")]
    assert by in (run.checkpoints[1].cause or "") or "somebodys" in (run.checkpoints[1].cause or "")
    assert run.known_latest() is None
    with pytest.raises(KeyUnavailable, match="step_2 may be it"):
        run.latest()
    assert plan_collection(run, now=time.time() + 9, older_than=0.0, off_line=True) == []
