"""Where checkpoints lie: the Storage port, its implementations, and the way from a user's target to one of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar
from urllib.parse import unquote, urlsplit

from asyncdcp.errors import InvalidOption, MissingDependency
from asyncdcp.storage.faults import FaultyOS
from asyncdcp.storage.local import LocalStorage
from asyncdcp.storage.local_place import LocalPlace
from asyncdcp.storage.memory import MemoryPlace, MemoryStorage
from asyncdcp.storage.place import Contents, Found, Place, Survey
from asyncdcp.storage.port import Buffer, Fetch, ObjectReader, ObjectWriter, Storage, StorageInfo, check_name
from asyncdcp.storage.spec import LocalSpec, ObjectStoreSpec, StorageSpec, spec_of

if TYPE_CHECKING:
    from types import ModuleType

__all__ = [
    "OBJECT_STORES",
    "Buffer",
    "Contents",
    "Fetch",
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

T = TypeVar("T")

OBJECT_STORES: Final = ("s3", "gs", "az", "memory")
"""URL schemes of object stores."""

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_ONE_SLASH: Final = re.compile(rf"(file|{'|'.join(OBJECT_STORES)}):/", re.IGNORECASE)
_TAKES: Final = "it takes a path, a URL (file://, s3://, gs://, az://, memory://) or a"


def open_storage(target: str | os.PathLike[str] | Storage) -> Storage:
    """The Storage of a path, of a URL (``file://``, or an object store's), or the given one itself.

    A path becomes absolute, a leading ``~`` is expanded; nothing is made or looked at yet. Raises ``InvalidOption``
    for anything else, and ``MissingDependency`` for an object store without its extra.
    """
    if isinstance(target, str | os.PathLike):
        return _by_text(target, "Storage", LocalStorage)
    if not hasattr(target, "claim"):
        raise InvalidOption(f"target is {target!r:.80}; {_TAKES} Storage")
    return target


def open_place(target: str | os.PathLike[str] | Place) -> Place:
    """The Place of a run: of a path, of a URL, or the given one itself. As ``open_storage``."""
    if isinstance(target, str | os.PathLike):
        return _by_text(target, "Place", LocalPlace)
    if not hasattr(target, "survey"):
        way_out = ", which holds many checkpoints; a Storage holds one" if hasattr(target, "claim") else ""
        raise InvalidOption(f"target is {target!r:.80}; {_TAKES} Place{way_out}")
    return target


def open_spec(spec: StorageSpec, *, kill_trainer: Callable[[], object] = lambda: None) -> Storage:
    """The Storage that a spec describes. ``kill_trainer`` is for a spec with faults, which may ask for that."""
    if isinstance(spec, LocalSpec):
        return LocalStorage(os.fsdecode(spec.path), direct_io=spec.direct_io)
    if isinstance(spec, ObjectStoreSpec):
        storage: Storage = _object_stores().ObjectStorage.from_spec(spec)
        return storage
    posix = FaultyOS(spec.faults, kill_trainer)
    return LocalStorage(os.fsdecode(spec.path), direct_io=spec.direct_io, posix=posix)


def _object_stores() -> ModuleType:
    """The package for object stores, imported at its first use; ``MissingDependency`` without its extra."""
    try:
        return import_module("asyncdcp.storage.object_store")
    except ImportError as error:
        raise MissingDependency(
            f"object stores need a package that is not there ({error}): pip install 'asyncdcp[object-store]'"
        ) from error


def __getattr__(name: str) -> Any:
    if name != "ObjectStorage":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _object_stores().ObjectStorage


def _by_text(target: str | os.PathLike[str], kind: Literal["Storage", "Place"], local: Callable[[str], T]) -> T:
    text = os.fspath(target)
    if not isinstance(text, str) or not text:
        raise InvalidOption(f"target is {target!r}; {_TAKES} {kind}")
    scheme = _SCHEME.match(text)
    if scheme is not None and scheme[1].lower() in OBJECT_STORES:
        made: T = getattr(_object_stores(), f"Object{kind}")(text)
        return made
    return local(os.path.expanduser(_path_of(text, kind)))


def _path_of(target: str, kind: str) -> str:
    scheme = _SCHEME.match(target)
    if scheme is None:
        if _ONE_SLASH.match(target):
            raise InvalidOption(
                f"target is {target!r}; a URL has two slashes behind the colon, of which pathlib.Path takes one away: "
                f"give it as a string. A directory of that name is ./{target}"
            )
        return target
    if scheme[1].lower() != "file":
        raise InvalidOption(
            f"target is {target!r}; there is no storage for {scheme[1]}:// "
            f"(asyncdcp.storage.fsspec.FsspecStorage may have one); {_TAKES} {kind}"
        )
    parts = urlsplit(target)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise InvalidOption(f"target is {target!r}; a file:// URL takes an absolute path: file:///where/it/lies")
    if parts.query or parts.fragment:
        raise InvalidOption(
            f"target is {target!r}; a file:// URL takes no query and no fragment; write ? as %3F, # as %23"
        )
    return unquote(parts.path)
