"""Multipart uploads that were begun and never ended: what a process leaves that dies in the middle of one.

No listing of objects shows them, and they are paid for. obstore cannot list them either, so boto3 does, where it is
installed and the store is S3 or speaks its language; Azure drops blocks that were never committed after a week by
itself, and for a bucket of Google's a lifecycle rule (AbortIncompleteMultipartUpload) does.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, NamedTuple, TypeVar

from anyio import CapacityLimiter

from asyncdcp.errors import StorageUnavailable
from asyncdcp.storage.object_store.connect import Access
from asyncdcp.storage.object_store.url import ObjectURL
from asyncdcp.storage.port import check_removable
from asyncdcp.threads import on_thread

T = TypeVar("T")

_NOT_OFFERED: Final = (400, 403, 405, 501)
"""How stores answer that have no such call, or do not let us make it: then there is nothing to be seen."""
_PASSING: Final = (408, 429, 500, 502, 503, 504)
"""How stores answer that may do it a moment later."""
_LONGEST_PAUSE: Final = 5.0
_TRUE: Final = ("1", "true", "on", "yes", "y")
_CONNECT_SECONDS: Final = 5
"""boto3 tries again by itself."""


class Upload(NamedTuple):
    """An unfinished upload. ``place`` is that of ``object`` below the prefix that was looked at, "" for it itself;
    ``begun`` is by the store's clock.
    """

    key: str
    id: str
    place: str
    object: str
    begun: float

    @property
    def name(self) -> str:
        return f".{self.object}.{hashlib.sha256(self.id.encode()).hexdigest()[:16]}"


class Uploads:
    """The unfinished multipart uploads of objects at one place. Each has a name of ours, which begins with a dot."""

    def __init__(self, url: ObjectURL, how: Access) -> None:
        self._url = url
        self._how = how
        self._limiter = CapacityLimiter(1)
        self._client: Any = None

    async def here(self) -> list[Upload]:
        """Those of the place's own objects; none where uploads cannot be seen."""
        return [upload for upload in await self.below() if not upload.place]

    async def below(self) -> list[Upload]:
        """Those of sub-places, too."""
        if self._url.scheme != "s3" or not _has_boto3():
            return []
        return await self._patiently(self._list)

    async def abort(self, names: Sequence[str]) -> None:
        """Aborts them; those that are gone are passed over."""
        for name in names:
            check_removable(name)
        uploads = [upload for upload in await self.here() if upload.name in names]
        await self._patiently(partial(self._abort, uploads))

    async def _patiently(self, function: Callable[[], T]) -> T:
        """Called until the store is not busy any more, within ``limits.retry``."""
        limits, clock = self._how.limits, asyncio.get_running_loop().time
        until, pause = clock() + limits.retry, limits.pause
        while True:
            try:
                return await on_thread(self._limiter, function)
            except StorageUnavailable as error:
                if error.errno != errno.EAGAIN or clock() + pause > until:
                    raise
            await asyncio.sleep(pause * random.SystemRandom().uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)

    # ── on a thread ──

    def _list(self) -> list[Upload]:
        prefix, found = self._url.key(""), list[Upload]()
        with self._translated("list the uploads of"):
            pages = self._connected().get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self._url.bucket, Prefix=prefix):
                for upload in page.get("Uploads", []):
                    key = upload["Key"]
                    if key.startswith(prefix):
                        place, _, name = key[len(prefix) :].rpartition("/")
                        found.append(Upload(key, upload["UploadId"], place, name, upload["Initiated"].timestamp()))
        return found

    def _abort(self, uploads: Sequence[Upload]) -> None:
        with self._translated("abort uploads of"):
            for upload in uploads:
                try:
                    self._connected().abort_multipart_upload(
                        Bucket=self._url.bucket, Key=upload.key, UploadId=upload.id
                    )
                except self._connected().exceptions.NoSuchUpload:
                    pass

    def _connected(self) -> Any:
        if self._client is None:
            config, session = self._how.config, _session(self._how.profile or None)
            self._client = session.client(
                "s3",
                endpoint_url=config.get("aws_endpoint_url_s3") or config.get("endpoint"),
                region_name=config.get("region") or config.get("default_region") or session.region_name or "us-east-1",
                config=import_module("botocore.config").Config(
                    retries={"total_max_attempts": 2},
                    connect_timeout=_CONNECT_SECONDS,
                    read_timeout=self._how.limits.claim_request,
                    signature_version=self._signature(),
                ),
                **self._keys(),
            )
        return self._client

    def _signature(self) -> Any:
        """None stands for boto3's own choice. It would look for credentials to list a public bucket, too."""
        unsigned = self._how.config.get("skip_signature", "").lower() in _TRUE
        return import_module("botocore").UNSIGNED if unsigned else None

    def _keys(self) -> dict[str, str]:
        """Keys that are given; boto3 looks for others itself."""
        config = dict(self._how.config)
        if self._how.provider is not None:
            given = self._how.provider()
            config = {name: given.get(name) for name in ("access_key_id", "secret_access_key")}
            config["session_token"] = given.get("token")
        names = {"aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key"}
        names["aws_session_token"] = "session_token"
        return {key: config[name] for key, name in names.items() if config.get(name)}

    @contextmanager
    def _translated(self, operation: str) -> Iterator[None]:
        errors = import_module("botocore.exceptions")
        try:
            yield
        except (errors.ClientError, errors.BotoCoreError) as error:
            status = getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status in _NOT_OFFERED:
                return
            unsafe = isinstance(error, errors.SSLError)
            passing = (isinstance(error, errors.HTTPClientError) and not unsafe) or status in _PASSING
            number = errno.EAGAIN if passing else None
            way = "; boto3 looks for certificates of one's own at AWS_CA_BUNDLE" if unsafe else ""
            message = f"cannot {operation} {self._url}: {error}{way}"
            raise StorageUnavailable(message, path=str(self._url), errno=number) from error


@lru_cache(maxsize=4)
def _session(profile: str | None) -> Any:
    """One for each profile: reading the description of S3 takes a tenth of a second."""
    return import_module("boto3").Session(profile_name=profile)


def _has_boto3() -> bool:
    return find_spec("boto3") is not None
