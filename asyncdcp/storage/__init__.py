"""Where checkpoints lie: the Storage port, its implementations, and the way from a user's target to one of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from urllib.parse import unquote, urlsplit

from asyncdcp.errors import InvalidOption
from asyncdcp.storage.faults import FaultyOS
from asyncdcp.storage.local import LocalStorage
from asyncdcp.storage.local_place import LocalPlace
from asyncdcp.storage.memory import MemoryStorage
from asyncdcp.storage.memory_place import MemoryPlace
from asyncdcp.storage.place import Contents, Found, Place, Survey
from asyncdcp.storage.port import Buffer, ObjectReader, ObjectWriter, Storage, StorageInfo, check_name
from asyncdcp.storage.spec import LocalSpec, StorageSpec, spec_of

__all__ = [
    "Buffer",
    "Contents",
    "Found",
    "LocalPlace",
    "LocalStorage",
    "MemoryPlace",
    "MemoryStorage",
    "ObjectReader",
    "ObjectWriter",
    "Place",
    "Storage",
    "StorageInfo",
    "StorageSpec",
    "Survey",
    "check_name",
    "open_place",
    "open_spec",
    "open_storage",
    "spec_of",
]


def open_storage(target: str | os.PathLike[str] | Storage) -> Storage:
    """The Storage of a path, of a ``file://`` URL, or the given one itself.

    A path becomes absolute, a leading ``~`` is expanded; nothing is made or looked at yet. Raises ``InvalidOption``
    for anything else.
    """
    if isinstance(target, str | os.PathLike):
        path = os.fspath(target)
        if not isinstance(path, str) or not path:
            raise InvalidOption(f"target is {target!r}; it takes a path, a file:// URL or a Storage")
        return LocalStorage(os.path.expanduser(_path_of(path)))
    if not hasattr(target, "claim"):
        raise InvalidOption(f"target is a {type(target).__name__}; it takes a path, a file:// URL or a Storage")
    return target


def open_place(target: str | os.PathLike[str] | Place) -> Place:
    """The Place of a run: of a path, of a ``file://`` URL, or the given one itself. As ``open_storage``."""
    if isinstance(target, str | os.PathLike):
        path = os.fspath(target)
        if not isinstance(path, str) or not path:
            raise InvalidOption(f"target is {target!r}; it takes a path, a file:// URL or a Place")
        return LocalPlace(os.path.expanduser(_path_of(path)))
    if not hasattr(target, "survey"):
        raise InvalidOption(f"target is a {type(target).__name__}; it takes a path, a file:// URL or a Place")
    return target


def open_spec(spec: StorageSpec, *, kill_trainer: Callable[[], object] = lambda: None) -> Storage:
    """The Storage that a spec describes. ``kill_trainer`` is for a spec with faults, which may ask for that."""
    if isinstance(spec, LocalSpec):
        return LocalStorage(os.fsdecode(spec.path), direct_io=spec.direct_io)
    posix = FaultyOS(spec.faults, kill_trainer)
    return LocalStorage(os.fsdecode(spec.path), direct_io=spec.direct_io, posix=posix)


def _path_of(target: str) -> str:
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", target)
    if scheme is None:
        return target
    if scheme[1].lower() != "file":
        raise InvalidOption(
            f"target is {target!r}; no storage for {scheme[1]}://; it takes a path, file:// or a Storage"
        )
    parts = urlsplit(target)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise InvalidOption(f"target is {target!r}; a file:// URL takes an absolute path: file:///where/it/lies")
    if parts.query or parts.fragment:
        raise InvalidOption(
            f"target is {target!r}; a file:// URL takes no query and no fragment; write ? as %3F, # as %23"
        )
    return unquote(parts.path)
