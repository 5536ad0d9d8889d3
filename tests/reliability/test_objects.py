"""The n-th request to an object store fails, or is a process's last: no false success, nothing lost, the next works."""

from __future__ import annotations

from contextlib import suppress
from typing import Any
from unittest.mock import patch

import pytest
from obstore.exceptions import BaseError

from asyncdcp.storage.object_store import ObjectStorage
from asyncdcp.storage.object_store.claim import Claimer
from asyncdcp.storage.object_store.writer import ObjectStoreWriter
from tests.reliability.objects import FAULTS, LOST, UNANSWERED, sweep
from tests.reliability.worlds import Lost


@pytest.mark.parametrize("fault", FAULTS)
def test_one_request_fails(fault: str) -> None:
    assert sweep(fault) > 12


@pytest.mark.parametrize("fault", FAULTS)
def test_all_requests_fail_from_one_on(fault: str) -> None:
    sweep(fault, sticky=True)


@pytest.mark.parametrize("fault", [LOST, UNANSWERED], ids=["before it", "after it"])
def test_the_process_stops_at_one(fault: str) -> None:
    assert sweep(fault, stops=True) > 12


def test_a_claim_that_takes_no_answer_for_a_yes_is_found() -> None:
    """The Record is not there, and what it replaces is deleted."""

    async def create(claimer: Claimer, operation: str, name: str, data: bytes) -> bool:
        with suppress(BaseError):
            await claimer.store.put_async(claimer.url.key(name), data, mode="create", use_multipart=False)
        return True

    with patch.object(Claimer, "create", create), pytest.raises(Lost, match=r"PUT .*, not one of \[2\]"):
        sweep(LOST)


def test_an_upload_that_is_taken_for_whole_is_found() -> None:
    """Its last request is lost, and nobody looks whether it is there."""

    async def completed(writer: ObjectStoreWriter, error: Exception) -> Any:
        return {"e_tag": None, "version": None}

    async def look_for(*_: object) -> None:
        pass

    looking = patch.object(ObjectStorage, "_look_for", look_for)
    completing = patch.object(ObjectStoreWriter, "_completed", completed)
    with looking, completing, pytest.raises(Lost, match="found version 0"):
        sweep(LOST)
