"""The one place where obstore's errors become asyncdcp's, with the path and the way out, and without a secret; and
where a request is sent again whose answer broke off, which obstore does not do by itself.

obstore tells little by the type of an error and much by its text: the answer's status, the store's own code in the
body, the kind of what failed below HTTP.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from obstore.exceptions import BaseError, InvalidPathError, PermissionDeniedError, UnauthenticatedError

from asyncdcp.errors import AsyncDCPError, StorageError, StorageUnavailable, storage_error
from asyncdcp.storage.object_store.url import ObjectURL
from asyncdcp.storage.spec import RequestLimits

_STATUS: Final = re.compile(r"status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>([^<]*)</Code>|\"code\":\s*\"?([A-Za-z]+)|\"message\":\s*\"([^\"]*)\"")
_MESSAGE: Final = re.compile(r"<Message>([^<]*)</Message>")
_GENERIC: Final = re.compile(r"^Generic \w+ error: ")
_QUERY: Final = re.compile(r"\?[^\s\"')]*")
_NO_BUCKET: Final = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist", "bucket was not found")
_ELSEWHERE: Final = (
    "incorrectly configured region",
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraint",
)
_ARCHIVED: Final = ("InvalidObjectState", "BlobArchived")
_EXPIRED: Final = ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired")
_SKEWED: Final = ("RequestTimeTooSkewed", "RequestExpired")
_REQUEST: Final = re.compile(
    r"Error performing (?P<method>\w+) (?P<scheme>\w+://)([^/\s?@]*@)?(?P<host>[^/\s?]+)\S*"
    r" in (?P<time>\d+(\.\d)?)\d*(?P<unit>\w+)"
    r"(, after (?P<retries>\d+) retries)?(,.*?)? +- (Server returned non-2xx status code: )?(?P<why>.*)"
)
"""What obstore says of a request; ``why`` ends with the line."""
_ROLES: Final = ("://169.254.169.254", "://169.254.170.", "://metadata.google.internal")
"""Where a machine's role is asked for, as is done where nothing else gives credentials."""
_CERTIFICATE: Final = re.compile(r"InvalidCertificate\(\s*(\w+)")
_SYSTEM: Final = re.compile(r"(?:message|error): \"([^\"]+)\"")
_NOT_SENT: Final = ("kind: Connect,", "builder error")
_CREDENTIALS: Final = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE (with boto3), or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or the machine's service account",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, or the machine's identity",
}
_ENDPOINT: Final = {"s3": "AWS_ENDPOINT_URL and AWS_REGION", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}
T = TypeVar("T")


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
    """What to raise for an error of obstore: ``StorageUnavailable``, but for what is said of one object, or of room."""
    path, text, status = f"{url}/{name}" if name else str(url), str(error), status_of(error)
    cannot = f"cannot {operation} {path}"
    missing = isinstance(error, FileNotFoundError)
    if (not name and (missing or status == 404)) or any(sign in text for sign in _NO_BUCKET):
        way = f"make it, or look for a typing error in the URL, and at {_endpoint(url)}"
        why = f"there is no bucket {url.bucket!r}; {way}"
        return StorageUnavailable(f"{cannot}: {why}", path=path, errno=errno.ENOENT)
    if missing:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if any(sign in text for sign in _ARCHIVED):
        why = f"it is archived ({said(error)}); restore it to a class that can be read"
        return StorageError(f"{cannot}: {why}", path=path, errno=errno.EACCES)
    if status == 507 or "QuotaExceeded" in text:
        return storage_error(f"{cannot}: {said(error)}", path, errno.ENOSPC)
    why, number = _unavailable(url, error)
    return StorageUnavailable(f"{cannot}: {why}", path=path, errno=number)


def _unavailable(url: ObjectURL, error: BaseException) -> tuple[str, int | None]:
    """Why the store did not do it, with the way out, and the system's number for that."""
    text, status = str(error), status_of(error)
    if any(sign in text for sign in _ELSEWHERE) or status in (301, 307):
        return f"the bucket is in another region or at another endpoint; set {_endpoint(url)} to where it is", None
    if any(role in text for role in _ROLES):
        what = f"no credentials were found, and this machine has no role ({said(error)})"
        return f"{what}; {_key_to(url, text)}", errno.EACCES
    if _is_denied(error):
        return f"access was denied ({said(error)}); {_key_to(url, text)}", errno.EACCES
    if status == 400 and "performing HEAD" in text:  # which is answered without a word
        what = "credentials may have expired, or the bucket be in another region"
        return f"{said(error)}: {what}; {_key_to(url, text)}", None
    if status is None and any(sign in text for sign in _NOT_SENT):
        return f"{said(error)}; look at {_endpoint(url)}", errno.ECONNREFUSED
    if isinstance(error, InvalidPathError):
        return f"{said(error)}; objects of such keys cannot be listed: rename that one, or take another prefix", None
    return said(error), errno.ETIMEDOUT if "kind: Timeout," in text else None


def _endpoint(url: ObjectURL) -> str:
    return _ENDPOINT.get(url.scheme, "the endpoint")


def _is_denied(error: BaseException) -> bool:
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status_of(error) in (401, 403):
        return True
    return any(f"<Code>{code}</Code>" in str(error) for code in _EXPIRED)


def _key_to(url: ObjectURL, text: str) -> str:
    """The way out of a denial."""
    if any(code in text for code in _SKEWED):
        return "set this machine's clock"
    where = credentials_of(url)
    return f"get new ones: {where}" if any(code in text for code in _EXPIRED) else where


def credentials_of(url: ObjectURL) -> str:
    """Where credentials are looked for."""
    return f"credentials come from {_CREDENTIALS.get(url.scheme, 'the environment')}"


def said(error: BaseException) -> str:
    """The error in one line: the store's own code and words where it gave them, nothing of a signed URL."""
    text, _, debug = str(error).partition("\n\nDebug source")
    status, code, words = status_of(error), _CODE.search(text), _MESSAGE.search(text)
    request = _REQUEST.search(text)
    notes: list[str] = []
    if request and request["retries"]:
        notes.append(f"asked {int(request['retries']) + 1} times in {request['time']} {request['unit']}")
    if code:
        line = f"{status or ''} {next(filter(None, code.groups()))}{': ' + words[1] if words else ''}"
    elif request:
        line = (status is None and _reason(debug)) or _QUERY.sub("?…", request["why"]).split(": <")[0]
        notes.insert(0, f"{request['method']} {request['scheme']}{request['host']}")
    else:
        line = _QUERY.sub("?…", next(iter(text.splitlines()), "").split(": <")[0])
        line = _GENERIC.sub("", line) or type(error).__name__
    line = " ".join(line.split()).strip(" :")
    return f"{line} ({', '.join(notes)})" if notes else line


def _reason(debug: str) -> str:
    """What failed below HTTP, out of how obstore's error looks inside; "" where that is not known."""
    if "InvalidContentType" in debug:
        return "what answers does not speak TLS, so https:// should perhaps be http://"
    if found := _CERTIFICATE.search(debug):
        return f"its certificate is not accepted: {found[1]}"
    if found := _SYSTEM.search(debug):
        return found[1]
    return "no answer in time" if "kind: Timeout," in debug else ""


async def again(limits: RequestLimits, call: Callable[[], Awaitable[T]]) -> T:
    """What ``call`` returns, called until no answer breaks off, within ``limits.retry``.

    For requests that may be carried out twice.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + limits.retry
    while True:
        try:
            return await call()
        except BaseError as error:
            if not was_cut(error) or loop.time() + limits.pause > until:
                raise
        await asyncio.sleep(limits.pause)
