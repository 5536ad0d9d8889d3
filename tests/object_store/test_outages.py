"""A store that does not answer, or lets nobody in, in the middle: said as it is, and nothing is taken for damaged."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest
import torch

from asyncdcp import CheckpointManager, SyncCheckpointer
from asyncdcp.errors import CommitUnknown, StorageUnavailable
from asyncdcp.storage.object_store import ObjectPlace
from asyncdcp.storage.object_store.uploads import Uploads
from asyncdcp.storage.spec import RequestLimits
from tests.object_store.conftest import BUCKET, KEYS, LIMITS
from tests.object_store.conftest import client as client_of
from tests.object_store.lean import S3Handler, running


class _Failing(S3Handler):
    """Refuses what ``fails`` chooses, by method and target."""

    fails: ClassVar[Callable[[str, str], tuple[int, str] | None]]

    def answer_request(self, body: memoryview) -> None:
        refusal = type(self).fails(self.command, self.path)
        if refusal:
            self.refuse(*refusal)
        else:
            super().answer_request(body)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a store that works, until it is made to fail."""
    monkeypatch.setattr(_Failing, "fails", staticmethod(lambda method, target: None), raising=False)
    with running(_Failing) as (endpoint, _):
        yield endpoint


@pytest.fixture
def place(endpoint: str) -> ObjectPlace:
    return place_at(endpoint, msgspec.structs.replace(LIMITS, retry=0.1, claim=0.1))


def place_at(endpoint: str, limits: RequestLimits) -> ObjectPlace:
    return ObjectPlace(f"s3://{BUCKET}/run", config={**KEYS, "endpoint": endpoint}, limits=limits)


def fail(monkeypatch: pytest.MonkeyPatch, chosen: Callable[[str, str], bool], status: int, code: str) -> None:
    monkeypatch.setattr(
        _Failing, "fails", staticmethod(lambda method, target: (status, code) if chosen(method, target) else None)
    )


def manager_of(run: ObjectPlace | Path, **options: object) -> CheckpointManager:
    return CheckpointManager(run, process=False, takeover_seconds=0.0, **options)  # type: ignore[arg-type]


def save(manager: CheckpointManager, *steps: int) -> None:
    for step in steps:
        manager.save(step, {"w": torch.full((8,), float(step))}).result()


OUTAGES = [(".safetensors", 503, "SlowDown"), (".index.json", 403, "AccessDenied"), (".json", 400, "ExpiredToken")]


@pytest.mark.parametrize(("what", "status", "code"), OUTAGES)
def test_no_older_checkpoint_is_restored_for_it(
    place: ObjectPlace, monkeypatch: pytest.MonkeyPatch, what: str, status: int, code: str
) -> None:
    state = {"w": torch.zeros(8)}
    with manager_of(place) as manager:
        save(manager, 1, 2)
    with manager_of(place, read_only=True) as manager:
        with monkeypatch.context() as outage, pytest.raises(StorageUnavailable, match=r"cannot open s3://.*step_2/"):
            fail(outage, lambda method, target: "step_2/" in target and what in target, status, code)
            manager.restore_latest(state).result()
        restored = manager.restore_latest(state).result()
        assert restored is not None and restored.step == 2 and state["w"].tolist() == [2.0] * 8


def test_a_small_file_that_cannot_be_written_is_told_as_that(
    place: ObjectPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it goes by one request, as a commit does, nothing about the commit is unknown."""
    with manager_of(place) as manager:
        save(manager, 1)
        with monkeypatch.context() as outage, pytest.raises(StorageUnavailable, match=r"\.safetensors .* 503 SlowDown"):
            fail(outage, lambda method, target: method == "PUT" and ".safetensors" in target, 503, "SlowDown")
            save(manager, 2)
        save(manager, 3)
        assert manager.steps().result() == [1, 3]


def test_a_commit_of_which_nothing_is_known_says_why(place: ObjectPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    record = re.compile(r"step_1/\w+\.json")
    with manager_of(place) as manager:
        manager.open().result()
        with monkeypatch.context() as outage, pytest.raises(CommitUnknown, match=r"load it once .* 503 SlowDown"):
            fail(outage, lambda method, target: method == "PUT" and bool(record.search(target)), 503, "SlowDown")
            save(manager, 1)


def test_it_is_no_damage_that_verify_finds(place: ObjectPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    with SyncCheckpointer(process=False) as checkpointer:
        checkpointer.save(place.storage, {"w": torch.ones(8)})
        for what, status, code in OUTAGES:
            with monkeypatch.context() as outage, pytest.raises(StorageUnavailable, match=r"cannot open s3://"):
                fail(outage, lambda method, target, what=what: what in target, status, code)  # type: ignore[misc]
                checkpointer.verify(place.storage)
        assert checkpointer.verify(place.storage).ok


def test_unfinished_uploads_are_asked_for_as_patiently_as_all_else(
    place: ObjectPlace, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """boto3 asks for them, which tries twice by itself."""
    left = iter(range(2))
    fail(monkeypatch, lambda method, target: "?uploads" in target and next(left, None) is not None, 503, "SlowDown")
    with manager_of(place_at(endpoint, LIMITS), read_only=True) as manager:
        assert manager.steps().result() == [] and next(left, None) is None
    fail(monkeypatch, lambda method, target: "?uploads" in target, 503, "SlowDown")
    told = pytest.raises(StorageUnavailable, match=r"cannot list the uploads of .*SlowDown")
    with manager_of(place, read_only=True) as manager, told:
        manager.steps().result()


@pytest.mark.parametrize("call", ["?uploads", "uploadId="])
async def test_unfinished_uploads_are_removed_as_patiently(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    place, client = place_at(endpoint, LIMITS), client_of(endpoint)
    client.create_multipart_upload(Bucket=BUCKET, Key="run/step_1/a")
    (name,) = await place.child("step_1").temporaries()
    left = iter(range(2))
    fail(monkeypatch, lambda method, target: call in target and next(left, None) is not None, 503, "SlowDown")
    await place.discard("step_1", [name])
    assert next(left, None) is None and await place.child("step_1").temporaries() == {}


async def test_a_certificate_that_boto3_does_not_know_is_told_at_once(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, tried = place_at(endpoint, LIMITS), []

    def refuse(self: Uploads) -> None:
        tried.append(self)
        raise import_module("botocore.exceptions").SSLError(endpoint_url=endpoint, error="certificate verify failed")

    monkeypatch.setattr(Uploads, "_connected", refuse)
    with pytest.raises(StorageUnavailable, match=r"certificate verify failed; .* AWS_CA_BUNDLE"):
        await place.storage.temporaries()
    assert len(tried) == 1
