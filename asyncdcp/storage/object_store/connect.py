"""From a URL to a store of obstore: what the environment says, what is given, and how long it may take.

Configuration is obstore's own, by its names ("access_key_id", "endpoint", "region" …): the environment's (AWS_…,
GOOGLE_…, AZURE_…) where nothing else is given. What is refreshable (the machine's role, a web identity's token file, a
container's endpoint, a profile by boto3) stays a source, from which each process fetches as it needs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from obstore.exceptions import BaseError, UnknownConfigurationKeyError
from obstore.store import AzureStore, GCSStore, MemoryStore, S3Store

from asyncdcp.errors import InvalidOption, MissingDependency
from asyncdcp.storage.object_store.failures import credentials_of, said
from asyncdcp.storage.object_store.url import ObjectURL
from asyncdcp.storage.spec import RequestLimits

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_CLOUDS: Final[Mapping[str, Any]] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
_PREFIXES: Final = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
_ALIASES: Final[Mapping[str, Mapping[str, str]]] = {
    "s3": {"endpoint_url": "endpoint", "endpoint_url_s3": "aws_endpoint_url_s3", "token": "session_token"},
    "gs": {"service_account_path": "service_account"},
    "az": {"access_key": "account_key", "master_key": "account_key", "sas_token": "sas_key"},
}
_OF_THE_URL: Final = ("bucket", "bucket_name", "container_name")
_ENDPOINTS: Final = ("endpoint", "aws_endpoint_url_s3", "base_url")
_S3_SOURCES: Final = (
    *("access_key_id", "skip_signature", "web_identity_token_file"),
    *("container_credentials_relative_uri", "container_credentials_full_uri"),
)
_UNKNOWN_KEY: Final = re.compile(r"Configuration key: '([^']*)'")

_TRIES: Final = 1000
"""No limit of its own: the time is."""
_LONGEST_PAUSE: Final = 15.0

_memories: Final[dict[str, MemoryStore]] = {}  # what lies at memory:// has to be somewhere, for as long as the process


@dataclass(frozen=True)
class Access:
    """How a store is reached. ``config`` may hold secrets, and is shown by its keys only."""

    config: Mapping[str, str]
    profile: str | None
    limits: RequestLimits
    provider: Any = None
    """A callable that obstore takes as ``credential_provider``."""

    def __repr__(self) -> str:
        return f"Access({', '.join(sorted(self.config))})"


def access(url: ObjectURL, config: Mapping[str, str], limits: RequestLimits, provider: Any = None) -> Access:
    """The environment's configuration, and ``config`` on top of it. ``InvalidOption`` for what the store has no key."""
    prefix = _PREFIXES.get(url.scheme, "")
    given = {_plain(url, key): str(value) for key, value in config.items()}
    found: dict[str, str] = {}
    if prefix:
        named = {_plain(url, key): value for key, value in os.environ.items() if key.startswith(prefix) and value}
        found = _of_known_keys(url, {key: value for key, value in named.items() if key not in _OF_THE_URL})
        unknown = (given.keys() - _of_known_keys(url, given).keys()) | (given.keys() & set(_OF_THE_URL))
        if unknown:
            raise InvalidOption(f"config has {', '.join(sorted(unknown))}, which {url.scheme}:// does not take")
    elif given:
        raise InvalidOption(f"{url.scheme}:// takes no configuration")
    merged = {**found, **given}
    _check(url, merged)
    profile = None if provider or url.scheme != "s3" else _profile(merged)
    return Access(merged, profile, limits, provider)


def connect(url: ObjectURL, how: Access, *, single: float | None = None) -> ObjectStore:
    """A store of the whole bucket. With ``single``, a number of seconds, each request gets so long and is sent once;
    without, each delete of S3 is a request of its own, as every store that speaks its language understands.
    """
    if url.scheme == "memory":
        return _memories.setdefault(url.bucket, MemoryStore())
    limits = how.limits
    retries: dict[str, Any] = {"max_retries": 0}
    if single is None:
        backoff = {"init_backoff": timedelta(seconds=limits.pause), "max_backoff": timedelta(seconds=_LONGEST_PAUSE)}
        retries = {"max_retries": _TRIES, "retry_timeout": timedelta(seconds=limits.retry), "backoff": backoff}
    options = {
        "connect_timeout": timedelta(seconds=limits.connect),
        "timeout": timedelta(seconds=single or limits.request),
        "allow_http": any(how.config.get(key, "").lower().startswith("http://") for key in _ENDPOINTS),
    }
    config = dict(how.config)
    if url.scheme == "s3" and single is None:
        config["disable_bulk_delete"] = "true"
    provider = how.provider if how.profile is None else _boto3_provider(how.profile)
    try:
        store: ObjectStore = _CLOUDS[url.scheme](
            url.bucket, config=config, client_options=options, retry_config=retries, credential_provider=provider
        )
    except (BaseError, ValueError) as error:
        raise InvalidOption(f"{url} cannot be reached: {said(error)}; {credentials_of(url)}") from error
    return store


def _plain(url: ObjectURL, key: str) -> str:
    """A key by one name of the several that it has, so that the environment's and a given one meet."""
    plain = key.lower().removeprefix(_PREFIXES.get(url.scheme, "").lower())
    if url.scheme == "az":
        plain = plain.removeprefix("storage_")
    return _ALIASES.get(url.scheme, {}).get(plain, plain)


def _check(url: ObjectURL, config: Mapping[str, str]) -> None:
    """``InvalidOption`` for what obstore would not say, but panic of."""
    for key, value in config.items():
        if key in _ENDPOINTS and not _is_url(value):
            shown = value.rpartition("@")[2]  # before it stands a password
            raise InvalidOption(
                f"the endpoint of {url.scheme}:// takes a URL, such as https://host:9000, not {shown!r} "
                f"(configuration key {key}, or {_PREFIXES[url.scheme]}… in the environment)"
            )
        if not key.startswith("service_account") and (value != value.strip() or not value.isprintable()):
            raise InvalidOption(f"the {key} of {url.scheme}:// has a space or a line break that does not belong to it")


def _is_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and " " not in value
    except ValueError:  # no port, or half an address
        return False


def _of_known_keys(url: ObjectURL, config: Mapping[str, str]) -> dict[str, str]:
    """Those that the store knows."""
    known = _known_keys(url.scheme, frozenset(config))
    return {key: value for key, value in config.items() if key in known}


@lru_cache(maxsize=64)
def _known_keys(scheme: str, keys: frozenset[str]) -> frozenset[str]:
    """Found by trying: obstore names a key that it does not know. A try takes milliseconds, hence the cache."""
    left = dict.fromkeys(keys, "0")
    while True:
        try:
            _CLOUDS[scheme]("bucket", config=left)
        except UnknownConfigurationKeyError as error:
            named = _UNKNOWN_KEY.search(str(error))
            if named is None or left.pop(named[1], None) is None:
                raise
        except (BaseError, ValueError):  # keys are looked at first, values after
            return frozenset(left)
        else:
            return frozenset(left)


def _profile(config: Mapping[str, str]) -> str | None:
    """The profile that credentials come from; "" for the default one of a credentials file."""
    if any(key in config for key in _S3_SOURCES):
        return None
    named = os.environ.get("AWS_PROFILE")
    if named:
        return named
    path = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or os.path.expanduser("~/.aws/credentials")
    return "" if os.path.exists(path) else None


def _boto3_provider(profile: str) -> Any:
    try:
        boto3 = import_module("boto3")  # which has no types, and users' type checkers need not hear of it
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise MissingDependency(
            "the credentials of an AWS profile need boto3: pip install 'asyncdcp[object-store]', or set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    try:
        return Boto3CredentialProvider(boto3.Session(profile_name=profile or None))
    except Exception as error:  # botocore's own tree, and ValueError where it found nothing
        raise InvalidOption(f"the AWS profile {profile or 'default'!r} gives no credentials: {error}") from error
