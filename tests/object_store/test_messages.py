"""What is said when it goes wrong: the path, the way out, and nothing secret."""

from __future__ import annotations

import sys
from collections.abc import Callable

import msgspec
import pytest

from asyncdcp.errors import InvalidOption, MissingDependency, StorageError
from asyncdcp.storage import open_place, open_storage, spec_of
from asyncdcp.storage.object_store import ObjectStorage
from asyncdcp.storage.object_store.failures import said
from asyncdcp.storage.spec import ObjectStoreSpec, RequestLimits, StorageSpec
from tests.object_store.conftest import BUCKET, KEYS, Make
from tests.object_store.proxy import proxied

SECRET = KEYS["secret_access_key"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("403", r"cannot list s3://\S+ \S+: access was denied \(403 AccessDenied: As told\); .*AWS_ACCESS_KEY_ID"),
        ("404", r"there is no bucket 'checkpoints'; make it, or look for a typing error in the URL"),
        ("301", r"another region or at another endpoint; set AWS_ENDPOINT_URL and AWS_REGION"),
        ("503", r"503 SlowDown: As told"),
    ],
)
async def test_answers_say_the_way_out(make: Make, endpoint: str, answer: str, message: str) -> None:
    async with proxied(endpoint) as proxy:
        proxy.choose = lambda request: answer
        storage = make(via=proxy.url, retry=0.1)
        with pytest.raises(StorageError, match=message) as caught:
            await storage.list()
    assert SECRET not in repr(caught.value) and SECRET not in str(caught.value.__cause__)
    assert caught.value.path == storage.info.location


async def test_a_bucket_that_is_not_there(make: Make) -> None:
    storage = make(f"s3://not-{BUCKET}/x")
    for call in (storage.list, lambda: storage.put("a", b"1"), lambda: storage.claim("a", b"1")):
        with pytest.raises(StorageError, match="there is no bucket 'not-checkpoints'"):
            await call()


async def test_a_server_that_is_not_there(make: Make) -> None:
    with pytest.raises(StorageError, match="error sending request; look at AWS_ENDPOINT_URL"):
        await make(via="http://127.0.0.1:1", retry=0.1).list()


def test_secrets_are_not_shown(make: Make) -> None:
    storage = make()
    spec = spec_of(storage)
    assert isinstance(spec, ObjectStoreSpec) and spec.config["secret_access_key"] == SECRET
    for shown in (repr(spec), str(spec), repr(storage), repr(storage._access), repr(spec.__rich_repr__())):
        assert SECRET not in shown
    assert "secret_access_key" in repr(spec)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=StorageSpec) == spec


def test_queries_of_signed_urls_are_not_shown() -> None:
    error = OSError("Error performing GET https://a.example/c/b?sv=1&sig=hidden in 3ms - HTTP error")
    assert "hidden" not in said(error) and "https://a.example/c/b" in said(error)


def test_the_environment_is_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_ENDPOINT_URL": "http://somewhere",
        "AWS_BUCKET": "of-another",
        "AWS_PAGER": "no option of a store",
    }.items():
        monkeypatch.setenv(name, value)
    spec = spec_of(ObjectStorage("s3://b1x/run", config={"AWS_REGION": "eu-north-1", "endpoint_url": "http://here"}))
    assert isinstance(spec, ObjectStoreSpec)
    assert spec.config == {
        "access_key_id": "id",
        "secret_access_key": "secret",
        "endpoint": "http://here",
        "region": "eu-north-1",
    }


@pytest.mark.parametrize("config", [{"regoin": "x"}, {"bucket": "b"}])
def test_options_that_no_store_has_are_named(config: dict[str, str]) -> None:
    with pytest.raises(InvalidOption, match=next(iter(config))):
        ObjectStorage("s3://b1x/run", config=config)


@pytest.mark.parametrize("limits", [{"request": 0.0}, {"claim": float("inf")}, {"retry": -1.0}])
def test_limits_are_checked(limits: dict[str, float]) -> None:
    with pytest.raises(InvalidOption, match=next(iter(limits))):
        RequestLimits(**limits)


def test_credentials_by_a_callable_do_not_travel() -> None:
    assert spec_of(ObjectStorage("gs://b1x/run", credentials=lambda: {"token": "t", "expires_at": None})) is None
    assert spec_of(ObjectStorage("memory://b1x/run")) is None


@pytest.mark.parametrize("target", ["s3://bucket/x", "gs://bucket/x", "az://container/x", "memory://x/y"])
@pytest.mark.parametrize("opened", [open_storage, open_place])
def test_without_the_extra_it_is_named(
    monkeypatch: pytest.MonkeyPatch, target: str, opened: Callable[[str], object]
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    for name in [name for name in sys.modules if name.startswith(("obstore.", "asyncdcp.storage.object_store"))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingDependency, match=r"asyncdcp\[object-store\]") as caught:
        opened(target)
    assert isinstance(caught.value, ImportError)
