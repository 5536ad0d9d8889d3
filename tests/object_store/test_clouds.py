"""Google's and Azure's stores: what is sent, against servers of our own that take what theirs do.

There is no server of Google's language to be had that knows its uploads in parts. Of Azure's there is Microsoft's own,
azurite: the promises are checked against it where it is installed (``npm install --global azurite``).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import operator
import shutil
import subprocess
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from urllib.request import Request, urlopen

import anyio
import pytest
import torch

from asyncdcp import CheckpointManager, KeepLast
from asyncdcp.storage import spec_of
from asyncdcp.storage.object_store import ObjectStorage
from asyncdcp.storage.object_store import writer as writing
from asyncdcp.storage.spec import ObjectStoreSpec
from asyncdcp.testing.storage import STORAGE_CHECKS, Check, StorageKit
from tests.object_store.azure import AzureHandler
from tests.object_store.conftest import LIMITS, OF_EACH_SERVER
from tests.object_store.lean import Memory, S3Handler, running
from tests.work import free_port

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's, which are the same for everybody."""
PART = 64 << 10
NAME = operator.attrgetter("__name__")
_numbers = itertools.count()


@pytest.fixture(params=["gs", "az"])
def cloud(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Memory]]:
    """A URL, to which the environment says the way, and what the server behind it holds."""
    scheme = request.param
    with running(S3Handler if scheme == "gs" else AzureHandler) as (endpoint, memory):
        for name, value in environment(scheme, endpoint).items():
            monkeypatch.setenv(name, value)
        yield f"{scheme}://bucket/run {next(_numbers)}", memory


def environment(scheme: str, endpoint: str) -> dict[str, str]:
    if scheme == "gs":
        return {"GOOGLE_BASE_URL": endpoint, "GOOGLE_BEARER_TOKEN": "token"}
    return {
        "AZURE_STORAGE_ENDPOINT": f"{endpoint}/{ACCOUNT}",
        "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": KEY,
    }


def kit_at(url: str) -> StorageKit:
    return StorageKit(
        lambda: ObjectStorage(f"{url}/{next(_numbers)}", limits=LIMITS),
        lambda storage: ObjectStorage(storage.info.location, limits=LIMITS),
    )


@pytest.mark.parametrize("check", OF_EACH_SERVER, ids=NAME)
async def test_promises(cloud: tuple[str, Memory], check: Check) -> None:
    await check(kit_at(cloud[0]))


async def test_a_run(cloud: tuple[str, Memory]) -> None:
    """Saved in parts by the background process, committed, deleted by retention, and loaded again."""
    url, memory = cloud
    state = {"long": torch.arange(3 << 20), "step": 0}
    async with CheckpointManager(url, process=True, keep=KeepLast(1)) as manager:
        for step in (1, 2):
            state["step"] = step
            await manager.save(step, state)
        await manager.wait()
        assert await manager.steps() == [2]
        loaded = await manager.load(2)
        assert loaded["step"] == 2 and torch.equal(loaded["long"], torch.arange(3 << 20))
    assert not any("step_1/" in name for name in memory.objects)
    parts = [target for method, target, _ in memory.seen if method == "PUT" and "partNumber=" in target]
    blocks = [target for method, target, _ in memory.seen if method == "PUT" and "comp=block&" in target]
    assert len(parts or blocks) == 2 * 4, "24 MiB and a little, in parts of 8"


async def test_a_claim_is_one_conditional_request(cloud: tuple[str, Memory]) -> None:
    url, memory = cloud
    storage = ObjectStorage(url, limits=LIMITS)
    assert await storage.claim("r", b"mine")
    [(method, _, headers)] = memory.seen
    assert method == "PUT"
    wanted = {"x-goog-if-generation-match": "0"}
    if url.startswith("az"):
        wanted = {"if-none-match": "*", "x-ms-blob-type": "BlockBlob"}
    assert wanted.items() <= headers.items()
    assert not await ObjectStorage(url, limits=LIMITS).claim("r", b"mine")


async def test_an_upload_that_is_given_up_leaves_no_object(
    cloud: tuple[str, Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was sent of it is removed from Google's; Azure's does so by itself."""
    url, memory = cloud
    monkeypatch.setattr(writing, "PART_BYTES", PART)
    writer = await ObjectStorage(url, limits=LIMITS).create("a", 3 * PART)
    await writer.write(0, memoryview(bytearray(2 * PART)))
    await writer.abort()
    assert not memory.objects and (url.startswith("az") or not memory.begun)


@pytest.mark.parametrize(
    ("url", "given", "known"),
    [
        (
            "gs://bucket/run",
            {"GOOGLE_SERVICE_ACCOUNT_PATH": "/key.json", "GOOGLE_BUCKET": "of-another", "GOOGLE_CLOUD_PROJECT": "mine"},
            {"service_account": "/key.json"},
        ),
        (
            "gs://bucket/run",
            {"GOOGLE_APPLICATION_CREDENTIALS": "/key.json", "GOOGLE_BASE_URL": "http://here"},
            {"application_credentials": "/key.json", "base_url": "http://here"},
        ),
        (
            "az://container/run",
            {
                "AZURE_STORAGE_ACCOUNT_NAME": "me",
                "AZURE_STORAGE_SAS_TOKEN": "sv=1",
                "AZURE_STORAGE_ENDPOINT": "http://here",
            },
            {"account_name": "me", "sas_key": "sv=1", "endpoint": "http://here"},
        ),
        (
            "az://container/run",
            {"AZURE_CLIENT_ID": "id", "AZURE_TENANT_ID": "tenant", "AZURE_FEDERATED_TOKEN_FILE": "/token"},
            {"client_id": "id", "tenant_id": "tenant", "federated_token_file": "/token"},
        ),
    ],
    ids=["gs key", "gs default", "az sas", "az identity"],
)
def test_the_environment_is_the_configuration(
    monkeypatch: pytest.MonkeyPatch, url: str, given: dict[str, str], known: dict[str, str]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    spec = spec_of(ObjectStorage(url))
    assert isinstance(spec, ObjectStoreSpec) and spec.config == known


# ── Microsoft's own ──


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("azurite is not installed")
    folder: Path = tmp_path_factory.mktemp("azurite")
    port = free_port()
    options = ["--silent", "--skipApiVersionCheck", "--disableTelemetry", "--location", str(folder)]
    command = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        next(line for line in server.stdout if "successfully listens" in line)
        _create_container(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
        server.terminate()


def _create_container(endpoint: str) -> None:
    """obstore does not; so the request is signed here (SharedKey)."""
    date, version = formatdate(usegmt=True), "2023-11-03"
    text = f"PUT{chr(10) * 12}x-ms-date:{date}\nx-ms-version:{version}\n/{ACCOUNT}/{ACCOUNT}/bucket\nrestype:container"
    signature = base64.b64encode(hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()).decode()
    headers = {"x-ms-date": date, "x-ms-version": version, "Authorization": f"SharedKey {ACCOUNT}:{signature}"}
    headers["Content-Length"] = "0"
    urlopen(Request(f"{endpoint}/{ACCOUNT}/bucket?restype=container", method="PUT", headers=headers)).close()


@pytest.mark.parametrize("check", STORAGE_CHECKS, ids=NAME)
async def test_promises_of_azurite(azurite: str, monkeypatch: pytest.MonkeyPatch, check: Check) -> None:
    for name, value in environment("az", azurite).items():
        monkeypatch.setenv(name, value)
    with anyio.fail_after(60):
        await check(kit_at(f"az://bucket/run {next(_numbers)}"))
