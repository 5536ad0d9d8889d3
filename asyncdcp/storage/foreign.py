"""Places that others wrote: a directory with names of their choosing, or a single file. For reading only."""

from __future__ import annotations

import os
from typing import NamedTuple, NoReturn, Protocol, runtime_checkable

from asyncdcp.errors import InvalidOption, UsageError
from asyncdcp.storage.local import LocalStorage
from asyncdcp.storage.port import Storage


class ForeignPlace(NamedTuple):
    """A place that may hold another format. ``name`` is the object that the caller named, None for all of the place.

    ``storage`` opens, gets and lists objects of any name; whoever only reads formats calls nothing else of it.
    """

    storage: Storage
    name: str | None


@runtime_checkable
class SeesForeign(Protocol):
    """A ``Storage`` whose place may hold objects under names that the port does not take."""

    def foreign(self) -> ForeignPlace:
        """The same place, to read what others wrote there. May block for a moment."""
        ...


class ForeignDirectory(LocalStorage):
    """A directory for reading, whose files may have any name, a leading dot too; nothing in it is ever changed."""

    async def list(self) -> dict[str, int]:
        """Every regular file, hidden ones too."""
        return {name: status.size for name, status in (await self._scan()).items()}

    def _join(self, name: str) -> str:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise InvalidOption(f"not a file's name: {name!r:.200}")
        return os.path.join(self._path, name)

    async def create(self, name: str, length_hint: int) -> NoReturn:
        raise self._refusal()

    async def put(self, name: str, data: bytes) -> NoReturn:
        raise self._refusal()

    async def claim(self, name: str, data: bytes) -> NoReturn:
        raise self._refusal()

    async def delete(self, names: object) -> NoReturn:
        raise self._refusal()

    def _refusal(self) -> UsageError:
        return UsageError(f"{self._path} is open for reading only", path=self._path)


def foreign_place(storage: Storage) -> ForeignPlace:
    """The place of a storage as readers of other formats see it. May block for a moment."""
    if isinstance(storage, SeesForeign):
        return storage.foreign()
    if not isinstance(storage, LocalStorage):
        return ForeignPlace(storage, None)
    path = storage.info.location
    directory, name = os.path.split(path)
    if storage.is_file():
        return ForeignPlace(ForeignDirectory(directory), name)
    return ForeignPlace(ForeignDirectory(path), None)
