"""What the port promises, of two implementations of S3 and of obstore's memory."""

from __future__ import annotations

import itertools
import operator

import pytest

from asyncdcp.storage import Storage
from asyncdcp.storage.object_store import ObjectStorage
from asyncdcp.testing.storage import STORAGE_CHECKS, Check, StorageKit
from tests.object_store.conftest import OF_EACH_SERVER, Make

NAME = operator.attrgetter("__name__")


@pytest.fixture
def moto(make: Make) -> StorageKit:
    return StorageKit(make, lambda storage: make(storage.info.location))


@pytest.fixture
def localbucket(make: Make, small_endpoint: str) -> StorageKit:
    via = small_endpoint
    return StorageKit(lambda: make(via=via), lambda storage: make(storage.info.location, via=via))


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> StorageKit:
    numbers = itertools.count()

    def new() -> Storage:
        return ObjectStorage(f"memory://{request.node.name.replace('[', '.').strip(']')}/{next(numbers)}")

    return StorageKit(new, lambda storage: ObjectStorage(storage.info.location))


@pytest.mark.parametrize("check", STORAGE_CHECKS, ids=NAME)
async def test_promises(moto: StorageKit, check: Check) -> None:
    await check(moto)


@pytest.mark.parametrize("check", STORAGE_CHECKS, ids=NAME)
async def test_promises_in_memory(memory: StorageKit, check: Check) -> None:
    await check(memory)


@pytest.mark.parametrize("check", OF_EACH_SERVER, ids=NAME)
async def test_promises_of_a_small_server(localbucket: StorageKit, check: Check) -> None:
    """What it answers otherwise than moto does: ranges, conditional PUTs, and deletes; it has no metadata."""
    await check(localbucket)
