from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import boto3
import msgspec
import pytest

from asyncdcp.storage.object_store import ObjectStorage
from asyncdcp.storage.spec import RequestLimits
from asyncdcp.testing.storage import contents, names
from tests.object_store.lean import S3Handler, running

BUCKET = "checkpoints"
KEYS = {"access_key_id": "test", "secret_access_key": "not-to-be-seen", "region": "us-east-1"}
LIMITS = RequestLimits(connect=10.0, request=30.0, retry=30.0, claim_request=10.0, claim=30.0, pause=0.01)
"""Which a busy machine does not meet. Tests in which somebody waits for one to pass set their own."""

OF_EACH_SERVER = (
    *(contents.reads_of_any_alignment, names.what_exists_is_not_made_again, names.what_is_missing),
    *(names.delete_passes_over_what_is_gone, names.of_many_claims_one_wins, names.nothing_is_left_of_what_ended),
)
"""The kit's checks of what one server answers otherwise than another."""

Make = Callable[..., ObjectStorage]


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """A server with one bucket, and its URL."""
    script = Path(__file__).with_name("server.py")
    command = [sys.executable, "-W", "ignore", str(script), *arguments]
    small_parts = {**os.environ, "S3_UPLOAD_PART_MIN_SIZE": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=small_parts) as server:
        assert server.stdin is not None and server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        client(url).create_bucket(Bucket=BUCKET)
        yield url
        server.stdin.close()


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """moto's server."""
    with serving("moto") as url:
        yield url


@pytest.fixture(scope="session")
def small_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """localbucket, which does only what is most needed of S3."""
    with serving("localbucket", str(tmp_path_factory.mktemp("bucket"))) as url:
        yield url


@pytest.fixture(scope="session")
def lean_endpoint() -> Iterator[str]:
    """Our own, on threads of this process: for what sends much, and asks little of the server."""
    with running(S3Handler) as (url, _):
        yield url


def client(endpoint: str) -> Any:
    """Another implementation's view of the same store."""
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    return _session().client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)


@lru_cache(maxsize=1)
def _session() -> Any:
    return boto3.Session()


_numbers = itertools.count()


@pytest.fixture
def make(endpoint: str) -> Make:
    """Makes a storage at a new place, or at a given one; ``via`` is another way to the same server."""

    def storage(place: str = "", via: str = "", **limits: float) -> ObjectStorage:
        place = place or f"s3://{BUCKET}/run {next(_numbers)}/step_1"
        changed = msgspec.structs.replace(LIMITS, **limits)
        return ObjectStorage(place, config={**KEYS, "endpoint": via or endpoint}, limits=changed)

    return storage


@pytest.fixture
def url(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A place by its URL alone: all else comes from the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for name, value in KEYS.items():
        monkeypatch.setenv(f"AWS_{name.upper()}", value)
    return f"s3://{BUCKET}/{request.node.name.replace('[', '.').strip(']')}"
