"""The one place where obstore's errors become asyncdcp's, with the path and the way out, and without a secret.

obstore tells little by the type of an error and much by its text: the answer's status, the store's own code in the
body, the kind of what failed below HTTP.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

from asyncdcp.errors import AsyncDCPError, StorageError, storage_error
from asyncdcp.storage.object_store.url import ObjectURL

_STATUS: Final = re.compile(r"status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>([^<]*)</Code>|\"code\":\s*\"?([A-Za-z]+)|\"message\":\s*\"([^\"]*)\"")
_MESSAGE: Final = re.compile(r"<Message>([^<]*)</Message>")
_QUERY: Final = re.compile(r"\?[^\s\"')]*")
_NO_BUCKET: Final = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist", "bucket was not found")
_ELSEWHERE: Final = (
    "incorrectly configured region",
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraint",
)
_NOT_SENT: Final = ("kind: Connect,", "builder error")
_CREDENTIALS: Final = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE (with boto3), or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or the machine's service account",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, or the machine's identity",
}
_ENDPOINT: Final = {"s3": "AWS_ENDPOINT_URL and AWS_REGION", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the store answered with; None where it did not answer."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def was_refused(error: BaseException) -> bool:
    """Whether the request was surely not carried out: the store said so, or it was never sent."""
    status = status_of(error)
    if status is None:
        return any(sign in str(error) for sign in _NOT_SENT)
    return 300 <= status < 500 and status not in (408, 409, 412)


def was_cut(error: BaseException) -> bool:
    """Whether the store answered, and the answer broke off."""
    text = str(error)
    return status_of(error) is None and ("kind: Interrupted," in text or "kind: Body," in text)


@contextmanager
def translated(operation: str, url: ObjectURL, name: str = "") -> Iterator[None]:
    """Errors of obstore within are raised as ``StorageError``, or as ``FileNotFoundError`` for a missing object."""
    try:
        yield
    except AsyncDCPError:
        raise
    except (BaseError, OSError) as error:
        raise known(operation, url, name, error) from error


def known(operation: str, url: ObjectURL, name: str, error: BaseException) -> OSError:
    """What to raise for an error of obstore."""
    path, text = f"{url}/{name}" if name else str(url), str(error)
    if any(sign in text for sign in _NO_BUCKET):
        way = f"make it, or look for a typing error in the URL, and at {_ENDPOINT.get(url.scheme, 'the endpoint')}"
        return _storage_error(operation, path, f"there is no bucket {url.bucket!r}; {way}", errno.ENOENT)
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    status = status_of(error)
    if any(sign in text for sign in _ELSEWHERE) or status in (301, 307):
        way = f"set {_ENDPOINT.get(url.scheme, 'the endpoint')} to where it is"
        return _storage_error(operation, path, f"the bucket is in another region or at another endpoint; {way}", None)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in (401, 403):
        way = f"credentials come from {_CREDENTIALS.get(url.scheme, 'the environment')}"
        return _storage_error(operation, path, f"access was denied ({said(error)}); {way}", errno.EACCES)
    if status == 507 or "QuotaExceeded" in text:
        return _storage_error(operation, path, said(error), errno.ENOSPC)
    if status is None and any(sign in text for sign in _NOT_SENT):
        way = f"{said(error)}; look at {_ENDPOINT.get(url.scheme, 'the endpoint')}"
        return _storage_error(operation, path, way, errno.ECONNREFUSED)
    timed_out = "kind: Timeout," in text
    return _storage_error(operation, path, said(error), errno.ETIMEDOUT if timed_out else None)


def said(error: BaseException) -> str:
    """The error in one line: the store's own code and words where it gave them, nothing of a signed URL."""
    text = str(error).split("\n\nDebug source")[0]
    status, code, words = status_of(error), _CODE.search(text), _MESSAGE.search(text)
    if code:
        what = next(part for part in code.groups() if part)
        return f"{status or ''} {what}{': ' + words[1] if words else ''}".strip()
    line = next(iter(text.splitlines()), "").strip() or type(error).__name__
    return _QUERY.sub("?…", line.split(": <")[0])


def _storage_error(operation: str, path: str, why: str, number: int | None) -> StorageError:
    return storage_error(f"cannot {operation} {path}: {why}", path, number)
