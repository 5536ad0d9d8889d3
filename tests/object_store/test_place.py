"""A run at a URL: its steps at a glance."""

from __future__ import annotations

import pytest

from asyncdcp.errors import InvalidOption
from asyncdcp.storage.object_store import ObjectPlace, uploads
from tests.object_store.conftest import BUCKET, KEYS, LIMITS, client


@pytest.fixture
def place(endpoint: str, request: pytest.FixtureRequest) -> ObjectPlace:
    return ObjectPlace(f"s3://{BUCKET}/{request.node.name}", config={**KEYS, "endpoint": endpoint}, limits=LIMITS)


async def test_a_survey_sees_everything(place: ObjectPlace, endpoint: str) -> None:
    assert (await place.survey(lambda child, name: True, 100)).children == {}
    await place.storage.put("own.json", b"own")
    for step in (1, 20):
        await place.child(f"step_{step}").put("a.json", b"%d" % step)
        await place.child(f"step_{step}").put("long.bin", bytes(200))
    await place.child("step_1").child("deeper").put("not.seen", b"")
    key = place.child("step_20").url.key("data.bin")
    client(endpoint).create_multipart_upload(Bucket=BUCKET, Key=key)
    survey = await place.survey(lambda child, name: name.endswith(".json") or child == "step_20", 100)
    assert survey.own.read == {"own.json": b"own"}
    assert sorted(survey.children) == ["step_1", "step_20"]
    one, twenty = survey.children["step_1"], survey.children["step_20"]
    assert {name: found.size for name, found in one.objects.items()} == {"a.json": 1, "long.bin": 200}
    assert (one.read, one.unread, one.temporaries) == ({"a.json": b"1"}, {}, {})
    assert twenty.read == {"a.json": b"20"} and "200 bytes" in twenty.unread["long.bin"]
    assert twenty.modified() > 0 and len(twenty.temporaries) == 1
    await place.discard("step_20", list(twenty.temporaries))
    assert (await place.survey(lambda child, name: False, 0)).children["step_20"].temporaries == {}


async def test_a_log_grows_line_by_line(place: ObjectPlace) -> None:
    for line in (b"one", b"two"):
        await place.append("log", line)
    assert await place.storage.get("log", 100) == b"one\ntwo\n"
    await place.storage.overwrite("log", b"one\ntw")
    await place.append("log", b"three")
    assert await place.storage.get("log", 100) == b"one\ntw\nthree\n"


async def test_a_public_bucket_is_looked_at_without_credentials(
    place: ObjectPlace, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.child("step_1").put("a.json", b"1")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    uploads._session.cache_clear()
    public = {"skip_signature": "true", "endpoint": endpoint, "region": "us-east-1"}
    reader = ObjectPlace(str(place.storage.url), config=public, limits=LIMITS)
    assert list((await reader.survey(lambda child, name: False, 0)).children) == ["step_1"]


def test_bad_names_are_refused(place: ObjectPlace) -> None:
    with pytest.raises(InvalidOption):
        place.child("../other")
