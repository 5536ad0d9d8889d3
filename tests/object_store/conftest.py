from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest

from asyncdcp.storage.object_store import ObjectStorage
from asyncdcp.storage.spec import RequestLimits

BUCKET = "checkpoints"
KEYS = {"access_key_id": "test", "secret_access_key": "not-to-be-seen", "region": "us-east-1"}
LIMITS = RequestLimits(connect=2.0, request=5.0, retry=5.0, claim_request=2.0, claim=5.0)

Make = Callable[..., ObjectStorage]


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """A server that speaks S3, with one bucket."""
    script = Path(__file__).with_name("server.py")
    server = subprocess.Popen([sys.executable, "-W", "ignore", str(script)], stdin=-1, stdout=-1)
    assert server.stdout is not None
    url = f"http://127.0.0.1:{int(server.stdout.readline())}"
    client(url).create_bucket(Bucket=BUCKET)
    yield url
    server.communicate()


def client(endpoint: str) -> boto3.client:
    """Another implementation's view of the same store."""
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


_numbers = itertools.count()


@pytest.fixture
def make(endpoint: str) -> Make:
    """Makes a storage at a new place, or at a given one; ``via`` is another way to the same server."""

    def storage(place: str = "", via: str = "") -> ObjectStorage:
        place = place or f"s3://{BUCKET}/run {next(_numbers)}/step_1"
        return ObjectStorage(place, config={**KEYS, "endpoint": via or endpoint}, limits=LIMITS)

    return storage
