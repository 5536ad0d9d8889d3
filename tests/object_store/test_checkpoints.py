"""Checkpoints at URLs, through the real checkpointer: on a thread, and by the background process."""

from __future__ import annotations

import pytest
import torch

from asyncdcp import AsyncCheckpointer
from asyncdcp.errors import CheckpointExists, CheckpointNotFound
from tests.object_store.conftest import BUCKET, KEYS, client


def _state() -> dict[str, torch.Tensor]:
    """Three slabs, some of it small."""
    generator = torch.Generator().manual_seed(0)
    long = torch.randn(5 << 20, generator=generator)
    return {"long": long, "short": torch.arange(10), "empty": torch.empty(0, 3)}


@pytest.fixture
def url(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A place by its URL alone: all else comes from the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for name, value in KEYS.items():
        monkeypatch.setenv(f"AWS_{name.upper()}", value)
    return f"s3://{BUCKET}/{request.node.name.replace('[', '.').strip(']')}"


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
