"""Runs at URLs: the manager's every verb, its mirror, and the command line, against a server."""

from __future__ import annotations

import json
import shutil
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncdcp
from asyncdcp import CheckpointManager, KeepLast
from asyncdcp.cli.main import main
from asyncdcp.errors import CheckpointNotFound, Fenced, InvalidOption
from asyncdcp.names import data_name, make_save_id
from tests.object_store.conftest import BUCKET, client

SIZE = 64


class Training:
    """A state whose every value tells the step it is of."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"w": torch.zeros(SIZE), "at": {"step": 0}}

    def at(self, step: int) -> dict[str, Any]:
        self.state["w"].fill_(step)
        self.state["at"]["step"] = step
        return self.state

    @property
    def step(self) -> int:
        (value,) = set(self.state["w"].tolist())
        assert value == self.state["at"]["step"]
        return int(value)


def manager_of(url: str | Path, *, process: bool = False, **options: Any) -> CheckpointManager:
    return CheckpointManager(url, process=process, takeover_seconds=0.0, **options)


def keys_below(endpoint: str, url: str) -> set[str]:
    prefix = url.removeprefix(f"s3://{BUCKET}/") + "/"
    found = client(endpoint).list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return {each["Key"].removeprefix(prefix) for each in found}


@pytest.mark.parametrize("process", [False, True])
async def test_a_run(url: str, endpoint: str, process: bool) -> None:
    """Saving, retention, resuming by another manager, rolling back."""
    training = Training()
    async with manager_of(url, process=process, keep=KeepLast(2)) as manager:
        assert manager.location == url
        assert await manager.restore_latest(training.state) is None
        for step in (1, 2, 3):
            await manager.save(step, training.at(step), metrics={"loss": 1 / step})
        await manager.wait()
        assert await manager.steps() == [2, 3]
        assert {key.split("/")[0] for key in keys_below(endpoint, url) if key.startswith("step_")} == {
            "step_2",
            "step_3",
        }
        async with manager_of(url, process=process, keep=KeepLast(2)) as other:
            resumed = Training()
            restored = await other.restore_latest(resumed.state)
            assert restored is not None and restored.step == resumed.step == 3
            rolled = await other.restore(2, resumed.state)
            assert rolled.step == resumed.step == 2
            await other.save(3, resumed.at(30))
            await other.wait()
            best = await other.best("loss")
            assert best is not None and best.step == 2
            assert (await other.load(3))["at"] == {"step": 30}
        with pytest.raises(Fenced):
            await manager.save(4, training.at(4))
            await manager.wait()
        with pytest.raises(Fenced):
            await manager.aclose()


async def test_readers_of_a_run(url: str, endpoint: str) -> None:
    training, found = Training(), list[int]()
    async with aclosing(asyncdcp.follow(url, poll_seconds=0.01)) as followed, manager_of(url) as manager:
        await manager.save(1, training.at(1))
        async for published in followed:
            target = Training()
            await published.load(target.state)
            found.append(target.step)
            if published.step == 2:
                break
            await manager.save(2, training.at(2))
    assert found == [1, 2]
    before = keys_below(endpoint, url)
    async with manager_of(url, read_only=True) as reader:
        assert await reader.steps() == [1, 2]
        restored = await reader.restore(1, training.state)
        assert restored.step == training.step == 1
        assert (latest := await reader.latest()) is not None and latest.step == 2
        with pytest.raises(InvalidOption, match="read-only"):
            reader.save(3, training.at(3))
        with pytest.raises(CheckpointNotFound):
            await reader.restore(7, training.state)
    assert keys_below(endpoint, url) == before


@pytest.mark.parametrize("process", [False, True])
async def test_a_run_on_a_disk_that_is_mirrored(url: str, tmp_path: Path, process: bool) -> None:
    run, training = tmp_path / "run", Training()
    options: dict[str, Any] = {"process": process, "mirror": url}
    async with manager_of(run, keep=KeepLast(1), mirror_keep=KeepLast(2), **options) as manager:
        for step in (1, 2, 3):
            await manager.save(step, training.at(step))
            await manager.wait()
        assert await manager.steps() == [3]
    async with manager_of(url, read_only=True) as far:
        assert await far.steps() == [2, 3]
    shutil.rmtree(run)
    training.at(9)
    async with manager_of(run, **options) as again:
        restored = await again.restore_latest(training.state)
        assert restored is not None and restored.step == training.step == 3
        await again.save(4, training.at(4))
    async with manager_of(url, read_only=True) as far:
        assert await far.steps() == [2, 3, 4]


def test_the_command_line(url: str, endpoint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One run, looked at by every command that takes a URL."""
    with manager_of(url) as manager:
        for step in (1, 2):
            manager.save(step, Training().at(step), metrics={"loss": 1 / step}).result()
    key = f"{url.removeprefix(f's3://{BUCKET}/')}/step_9/{data_name(make_save_id('run', url, 1), 0, 0)}"
    client(endpoint).create_multipart_upload(Bucket=BUCKET, Key=key)

    def ran(*arguments: str, status: int = 0) -> str:
        capfd.readouterr()
        assert main(list(arguments)) == status, capfd.readouterr().err
        return capfd.readouterr().out

    listed = json.loads(ran("ls", url, "--json"))
    assert [entry["step"] for entry in listed if entry["state"] == "committed"] == [1, 2]
    assert ran("inspect", f"{url}/step_2").startswith(f"{url}/step_2\n")
    assert f"whole    {url}/step_2" in ran("verify", f"{url}/step_1", f"{url}/step_2")
    assert ran("diff", f"{url}/step_1", f"{url}/step_1", "--values").endswith("\n")
    assert "at.step" in ran("diff", f"{url}/step_1", f"{url}/step_2", "--values", status=1)
    assert [line["step"] for line in json.loads(ran("history", url, "--json"))] == [1, 2]
    assert ran("report", url, "-o", str(tmp_path / "report.html")) and (tmp_path / "report.html").stat().st_size > 1000
    ran("convert", f"{url}/step_2", str(tmp_path / "local"))
    ran("convert", str(tmp_path / "local"), f"{url}-converted/step_2")
    ran("diff", f"{url}/step_2", f"{url}-converted/step_2", "--values")
    (left,) = json.loads(ran("gc", url, "--older-than", "0", "--json"))
    assert (left["kind"], left["name"], left["deleted"]) == ("temporaries", "step_9", False)
    (left,) = json.loads(ran("gc", url, "--older-than", "0", "--delete", "--json"))
    assert left["deleted"] and ran("gc", url, "--older-than", "0").startswith("nothing to delete")
    assert not client(endpoint).list_multipart_uploads(Bucket=BUCKET, Prefix=key).get("Uploads")
    damaged = next(name for name in keys_below(endpoint, url) if name.startswith("step_2/") and "safetensors" in name)
    at = f"{url.removeprefix(f's3://{BUCKET}/')}/{damaged}"
    body = bytearray(client(endpoint).get_object(Bucket=BUCKET, Key=at)["Body"].read())
    body[-1] ^= 1
    client(endpoint).put_object(Bucket=BUCKET, Key=at, Body=bytes(body))
    ran("verify", f"{url}/step_2", status=1)
