"""What the port promises, of two implementations of S3 and of obstore's memory."""

from __future__ import annotations

import itertools

import pytest

from asyncdcp.storage import Storage
from asyncdcp.storage.object_store import ObjectStorage
from asyncdcp.testing.storage import STORAGE_CHECKS, Check, StorageKit
from tests.object_store.conftest import Make


@pytest.fixture(params=["moto", "localbucket", "memory"])
def kit(request: pytest.FixtureRequest, make: Make) -> StorageKit:
    if request.param == "moto":
        return StorageKit(make, lambda storage: make(storage.info.location))
    if request.param == "localbucket":
        via = request.getfixturevalue("small_endpoint")
        return StorageKit(lambda: make(via=via), lambda storage: make(storage.info.location, via=via))
    numbers = itertools.count()

    def new() -> Storage:
        return ObjectStorage(f"memory://{request.node.name.replace('[', '.').strip(']')}/{next(numbers)}")

    return StorageKit(new, lambda storage: ObjectStorage(storage.info.location))


@pytest.mark.parametrize("check", STORAGE_CHECKS, ids=lambda check: check.__name__)
async def test_promises(kit: StorageKit, check: Check) -> None:
    await check(kit)
