"""What is said when it goes wrong: the path, the way out, and nothing secret."""

from __future__ import annotations

import sys
from collections.abc import Callable

import msgspec
import pytest

from asyncdcp.errors import InvalidOption, MissingDependency, StorageError, StorageUnavailable
from asyncdcp.storage import open_place, open_storage, spec_of
from asyncdcp.storage.object_store import ObjectStorage
from asyncdcp.storage.object_store.failures import known, said
from asyncdcp.storage.object_store.url import parse_url
from asyncdcp.storage.spec import ObjectStoreSpec, RequestLimits, StorageSpec
from tests.object_store.conftest import BUCKET, KEYS, Make, client
from tests.object_store.lean import S3Handler, running
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
    with pytest.raises(StorageError, match=r"Connection refused \(GET http://127.0.0.1:1, .*\); look at AWS_END"):
        await make(via="http://127.0.0.1:1", retry=0.1).list()


class _Refusing(S3Handler):
    """Answers everything with what it was told."""

    told = (403, "AccessDenied")

    def answer_request(self, body: memoryview) -> None:
        self.refuse(*self.told)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "RequestTimeTooSkewed", r"access was denied \(403 RequestTimeTooSkewed: .*; set this machine's clock$"),
        (400, "ExpiredToken", r"access was denied \(400 ExpiredToken: .*; get new ones: .*AWS_ACCESS_KEY_ID"),
        (403, "InvalidObjectState", r"it is archived \(403 InvalidObjectState: .*; restore it to a class"),
        (404, "NoSuchKey", "there is no bucket 'checkpoints'; .* AWS_ENDPOINT_URL"),
    ],
)
async def test_codes_say_the_way_out(
    make: Make, monkeypatch: pytest.MonkeyPatch, status: int, code: str, message: str
) -> None:
    monkeypatch.setattr(_Refusing, "told", (status, code))
    with running(_Refusing) as (endpoint, _), pytest.raises(StorageError, match=message) as caught:
        await make(via=endpoint, retry=0.1).list()
    assert isinstance(caught.value, StorageUnavailable) == (code != "InvalidObjectState")


async def test_what_is_answered_without_a_word_says_what_it_may_be(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A HEAD has no body that could say more."""
    monkeypatch.setattr(_Refusing, "told", (400, "ExpiredToken"))
    with running(_Refusing) as (endpoint, _), pytest.raises(StorageUnavailable, match=r"400 .*may have expired, or"):
        await make(via=endpoint, retry=0.1).open("a")


async def test_an_object_that_nobody_can_list_is_named(make: Make, endpoint: str) -> None:
    """Another program's, such as one that joins paths by adding them."""
    storage = make()
    client(endpoint).put_object(Bucket=BUCKET, Key=f"{storage.url.prefix}//x", Body=b"")
    with pytest.raises(StorageError, match=r"step_1//\S* contained empty path segment; .* rename that one"):
        await storage.objects_below()


def test_a_machine_without_a_role_lacks_credentials() -> None:
    told = "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 1.2s, after 3 retries, "
    told += "max_retries: 9, retry_timeout: 1s  - HTTP error"
    error = known("list", parse_url("s3://bucket"), "", OSError(told))
    assert "no credentials were found" in str(error) and "AWS_ACCESS_KEY_ID" in str(error)
    assert "(HTTP error (PUT http://169.254.169.254, asked 4 times in 1.2 s))" in str(error)


async def test_the_trouble_of_a_store_is_told_at_once(make: Make) -> None:
    assert await make().trouble() is None
    told = await make(via="http://user:hidden@127.0.0.1:1").trouble()
    assert told is not None and "Connection refused (GET http://127.0.0.1:1); look at AWS_ENDPOINT_URL" in told


@pytest.mark.parametrize(
    "endpoint",
    ["localhost:9000", "127.0.0.1:9000", "http://", "http://h:port", "http://h:99999", "http://[::1", "http://h/x y"],
)
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    """obstore panics of it."""
    with pytest.raises(InvalidOption, match=r"the endpoint of s3:// takes a URL, such as https://host:9000, not"):
        ObjectStorage("s3://b1x/run", config={"endpoint_url": endpoint})


def test_values_with_a_line_break_are_refused_and_not_shown() -> None:
    """As a secret has that was read from a file."""
    for key in ("access_key_id", "session_token", "region"):
        with pytest.raises(InvalidOption, match=f"the {key} of s3:// has a space or a line break") as caught:
            ObjectStorage("s3://b1x/run", config={key: "hidden\n"})
        assert "hidden" not in str(caught.value)
    ObjectStorage("gs://b1x/run", config={"service_account_key": "{\n}\n"})


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
    assert said(error) == "HTTP error (GET https://a.example)"


def test_what_a_store_says_is_one_line() -> None:
    """Azure's words have three."""
    told = "status code: 403 Forbidden: <Error><Code>Denied</Code><Message>No.\nRequestId:1\nTime:2</Message></Error>"
    assert said(OSError(told)) == "403 Denied: No. RequestId:1 Time:2"


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


async def test_credentials_that_are_not_whole_say_where_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    told = r"^s3://b1x/run cannot be reached: Missing SecretAccessKey; credentials come from AWS_ACCESS_KEY_ID and"
    with pytest.raises(InvalidOption, match=told):
        await ObjectStorage("s3://b1x/run", config={"access_key_id": "a"}).list()


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
