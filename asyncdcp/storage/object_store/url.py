"""What of a URL counts: the scheme of the store, its bucket, and the prefix of the objects' keys."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from asyncdcp.errors import InvalidOption

SCHEMES: Final = ("s3", "gs", "az", "memory")

_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9]*)://([^/]*)(?:/(.*))?", re.DOTALL)
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PREFIX: Final = re.compile(r"[A-Za-z0-9 !$&'()+,./:;=@_-]*")


@dataclass(frozen=True)
class ObjectURL:
    """``prefix`` has no slash at either end; a URL is written back by ``str``."""

    scheme: str
    bucket: str
    prefix: str

    def key(self, name: str) -> str:
        """The key of the object of that name."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def child(self, name: str) -> ObjectURL:
        """The place of that name below this one."""
        return ObjectURL(self.scheme, self.bucket, self.key(name))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}".rstrip("/")


def parse_url(url: str) -> ObjectURL:
    """Raises ``InvalidOption`` for what is no URL of an object store, or has a prefix that stores treat differently."""
    found = _URL.fullmatch(url)
    if found is None or found[1].lower() not in SCHEMES:
        raise _invalid(url, f"it takes {', '.join(f'{scheme}://' for scheme in SCHEMES)}")
    bucket, prefix = found[2], (found[3] or "").rstrip("/")
    if not _BUCKET.fullmatch(bucket):
        raise _invalid(url, f"it takes {found[1]}://bucket/prefix")
    if not _PREFIX.fullmatch(prefix):
        raise _invalid(url, "a prefix takes letters, digits and !$&'()+,./:;=@_- and spaces")
    if prefix and not all(part.strip(".") for part in prefix.split("/")):
        raise _invalid(url, "no part of a prefix may be empty or consist of dots")
    return ObjectURL(found[1].lower(), bucket, prefix)


def _invalid(url: str, takes: str) -> InvalidOption:
    return InvalidOption(f"not the URL of an object store: {url!r}; {takes}")
