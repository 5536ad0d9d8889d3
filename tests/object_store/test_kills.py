"""SIGKILL for a trainer or its background process while it saves to S3: the checkpoint is there, or it is not."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest
import torch
from anyio import to_thread

from asyncdcp import AsyncCheckpointer
from asyncdcp.cli.main import main
from asyncdcp.errors import AsyncDCPError, CheckpointNotFound
from tests.object_store.conftest import BUCKET, client
from tests.object_store.proxy import proxied
from tests.worker.conftest import LONG, Trainers, has_ended, state, worker_of


@pytest.fixture(scope="module")
def endpoint(lean_endpoint: str) -> str:
    return lean_endpoint


@pytest.fixture
def trainers(url: str) -> Iterator[Trainers]:
    """Which find the server by their environment."""
    made = Trainers()
    yield made
    made.close()


def unfinished(endpoint: str, url: str) -> int:
    prefix = url.removeprefix(f"s3://{BUCKET}/") + "/"
    return len(client(endpoint).list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", []))


def test_a_trainer_dies(trainers: Trainers, url: str, endpoint: str) -> None:
    """Not staged: its background process aborts the save, and the upload. Staged: it commits."""
    with AsyncCheckpointer(process=False) as reader:
        orders: list[dict[str, int]] = [{"kill_at_slab": 3}, {"kill_when_staged": True}]
        for number, order in enumerate(orders):
            worker = trainers.begin(path=f"{url}/step_1", number=number, **order)
            try:
                assert trainers.go()["signal"] == signal.SIGKILL
                assert has_ended(worker), "the background process lives on"
            finally:
                os.close(worker)
            assert unfinished(endpoint, url) == 0
            if number == 0:
                with pytest.raises(CheckpointNotFound):
                    reader.load(f"{url}/step_1").result(LONG)
        found = reader.load(f"{url}/step_1").result(LONG)
        assert found["number"] == 1 and torch.equal(found["w"], state(1)["w"])


async def test_its_background_process_dies_in_an_upload(
    url: str, endpoint: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The save fails, the next one works; ``gc`` finds the upload that nobody ended."""
    async with proxied(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        async with AsyncCheckpointer(process=True) as checkpointer:
            worker = await to_thread.run_sync(worker_of, checkpointer)
            proxy.choose = lambda request: "stall" if request.is_part else ""
            save = checkpointer.save(f"{url}/step_1", state(1))
            await proxy.stalled.wait()
            os.kill(worker.pid, signal.SIGKILL)
            with pytest.raises(AsyncDCPError, match="background process"):
                await save
            proxy.choose = lambda request: ""
            assert unfinished(endpoint, url) == 1
            with pytest.raises(CheckpointNotFound):
                await checkpointer.load(f"{url}/step_1")
            await checkpointer.save(f"{url}/step_1", state(2))
            assert (await checkpointer.load(f"{url}/step_1"))["number"] == 2
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    await to_thread.run_sync(main, ["gc", url, "--older-than", "0", "--delete", "--json"])
    (left, *_) = json.loads(capfd.readouterr().out)
    assert left["kind"] == "temporaries" and left["deleted"]
    assert unfinished(endpoint, url) == 0
    async with AsyncCheckpointer(process=False) as reader:
        assert (await reader.load(f"{url}/step_1"))["number"] == 2
