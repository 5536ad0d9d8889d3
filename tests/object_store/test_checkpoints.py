"""Checkpoints at URLs, through the real checkpointer: on a thread, and by the background process."""

from __future__ import annotations

import random

import pytest
import torch

from asyncdcp import AsyncCheckpointer
from asyncdcp.errors import CheckpointExists, CheckpointNotFound, StorageError
from tests.object_store.conftest import BUCKET, Make, client
from tests.object_store.proxy import proxied


def _state() -> dict[str, torch.Tensor]:
    """Three slabs, some of it small."""
    generator = torch.Generator().manual_seed(0)
    long = torch.randn(5 << 20, generator=generator)
    return {"long": long, "short": torch.arange(10), "empty": torch.empty(0, 3)}


@pytest.mark.parametrize("process", [False, True])
async def test_a_round_trip(url: str, endpoint: str, process: bool) -> None:
    state = _state()
    async with AsyncCheckpointer(process=process) as checkpointer:
        result = await checkpointer.save(f"{url}/step_1", state)
        assert (result.path, result.filesystem) == (f"{url}/step_1", "s3")
        loaded = await checkpointer.load(f"{url}/step_1")
        assert all(torch.equal(loaded[name], state[name]) for name in state)
        with pytest.raises(CheckpointExists):
            await checkpointer.save(f"{url}/step_1", state)
        await checkpointer.save(f"{url}/step_1", {"other": torch.ones(3)}, overwrite=True)
        assert list(await checkpointer.load(f"{url}/step_1")) == ["other"]
        with pytest.raises(CheckpointNotFound):
            await checkpointer.load(f"{url}/step_2")
    prefix = f"{url}/step_1".removeprefix(f"s3://{BUCKET}/")
    kept = client(endpoint).list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]
    assert sorted(found["Key"].rsplit(".", 1)[1] for found in kept) == ["json", "json", "safetensors"]
    assert not client(endpoint).list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads")


@pytest.mark.parametrize("process", [False, True])
async def test_saves_through_a_storm(make: Make, lean_endpoint: str, process: bool) -> None:
    """One request in eight meets with a fault: every save that is called durable can be loaded, and is what it was."""
    chance = random.Random(7)
    faults = ["500", "503", "reset", "after reset", "after 500", "truncate"]
    async with proxied(lean_endpoint) as proxy, AsyncCheckpointer(process=process) as checkpointer:
        proxy.choose = lambda request: chance.choice(faults) if chance.random() < 0.125 else ""
        places = []
        for number in range(3):
            state = {"long": torch.full((3 << 20,), float(number)), "number": number}
            storage = make(via=proxy.url, retry=30.0, claim=30.0)
            await checkpointer.save(storage, state)
            places.append(storage)
        for number, storage in enumerate(places):
            for reader in (storage, make(storage.info.location, via=lean_endpoint)):
                loaded = await checkpointer.load(reader)
                assert loaded["number"] == number and torch.equal(loaded["long"], torch.full((3 << 20,), float(number)))
            names = sorted(
                name.partition(".")[2] for name in await make(storage.info.location, via=lean_endpoint).list()
            )
            assert names == ["index.json", "json", "safetensors"]
        assert any(request.fault for request in proxy.seen)
        parts = [request.length for request in proxy.seen if request.is_part]
        assert parts and all(length >= 5 << 20 for length in parts if length != min(parts)), "S3 takes no less"


@pytest.mark.parametrize("process", [False, True])
async def test_a_save_that_cannot_go_on_fails_and_leaves_an_abort(make: Make, endpoint: str, process: bool) -> None:
    async with proxied(endpoint) as proxy, AsyncCheckpointer(process=process) as checkpointer:
        storage = make(via=proxy.url, retry=0.3)
        proxy.choose = lambda request: "500" if request.is_part else ""
        with pytest.raises(StorageError, match="500 InternalError"):
            await checkpointer.save(storage, _state())
        place = make(storage.info.location)
        assert [name.partition(".")[2] for name in await place.list()] in ([], ["json"])
        assert await place.temporaries() == {}
        with pytest.raises(CheckpointNotFound):
            await checkpointer.load(place)
