"""A directory whose sub-directories are places of their own."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from asyncdcp.errors import CorruptCheckpoint, InvalidOption, is_unavailable
from asyncdcp.storage.files import Descriptor, absolute, translated, write_all
from asyncdcp.storage.local import LocalStorage
from asyncdcp.storage.place import Contents, Found, Selects, Survey
from asyncdcp.storage.port import check_name
from asyncdcp.storage.posix import SYSTEM, FileStatus, Posix
from asyncdcp.threads import on_executor

_NOT_EMPTY: Final = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR})


class LocalPlace:
    """A ``Place`` that is one directory. Symbolic links to directories are sub-places too."""

    def __init__(self, path: str | os.PathLike[str], *, direct_io: bool = True, posix: Posix = SYSTEM) -> None:
        self._storage = LocalStorage(path, direct_io=direct_io, posix=posix)
        self._path = absolute(path)
        self._direct_io = direct_io
        self._posix = posix

    @property
    def storage(self) -> LocalStorage:
        return self._storage

    def child(self, name: str) -> LocalStorage:
        return LocalStorage(self._join(name), direct_io=self._direct_io, posix=self._posix)

    async def survey(self, selects: Selects, limit: int) -> Survey:
        with translated("list", self._path):
            return await on_executor(self._survey, selects, limit)

    async def append(self, name: str, line: bytes) -> None:
        path = self._join(name)
        with translated("append to", path):
            made = await on_executor(self._append, path, line)
        if made:
            await self._storage.barrier()

    async def discard(self, name: str, temporaries: Sequence[str] = ()) -> None:
        path = self._join(name)
        for temporary in temporaries:
            if not temporary.startswith(".") or "/" in temporary:
                raise InvalidOption(f"{temporary!r} is not the name of a temporary")
        with translated("remove", path):
            await on_executor(self._discard, path, temporaries)

    def _join(self, name: str) -> str:
        return os.path.join(self._path, check_name(name))

    # ── on a thread ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _survey(self, selects: Selects, limit: int) -> Survey:
        found = Survey()
        top = self._scan(self._path)
        self._fill(found.own, "", top, selects, limit)
        for name, status in top.items():
            if stat.S_ISDIR(status.mode) and not name.startswith("."):
                contents = found.children[name] = Contents()
                try:
                    entries = self._scan(os.path.join(self._path, name))
                except OSError as error:
                    contents.unread[""] = _damage(error)
                    continue
                self._fill(contents, name, entries, selects, limit)
        return found

    def _scan(self, path: str) -> dict[str, FileStatus]:
        try:
            return self._posix.scan(path)
        except FileNotFoundError:
            return {}

    def _fill(
        self, contents: Contents, child: str, entries: dict[str, FileStatus], selects: Selects, limit: int
    ) -> None:
        for name, status in entries.items():
            if not stat.S_ISREG(status.mode):
                continue
            found = Found(status.size, status.modified)
            if name.startswith("."):
                contents.temporaries[name] = found
                continue
            contents.objects[name] = found
            if selects(child, name):
                self._read(contents, os.path.join(self._path, child, name), limit)

    def _read(self, contents: Contents, path: str, limit: int) -> None:
        name = os.path.basename(path)
        try:
            contents.read[name] = self._storage.load(path, limit)
        except FileNotFoundError:
            del contents.objects[name]
        except (OSError, EOFError, CorruptCheckpoint) as error:
            contents.unread[name] = _damage(error)

    def _append(self, path: str, line: bytes) -> bool:
        """Whether the file was made by this call."""
        self._storage.make()
        file = Descriptor(self._posix, path)
        fd = file.open(os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            size = self._posix.fstat(fd).size
            last = bytearray(1)
            if size and self._posix.preadv(fd, [memoryview(last)], size - 1, 0) and last != b"\n":
                line = b"\n" + line  # a crash has cut the last line off
            write_all(self._posix, fd, line + b"\n", size)  # O_APPEND: at the end, whatever the offset
            self._posix.fsync(fd)
            return not size
        finally:
            file.close()

    def _discard(self, path: str, temporaries: Sequence[str]) -> None:
        for name in temporaries:
            with suppress(FileNotFoundError):
                self._posix.unlink(os.path.join(path, name))
        try:
            self._posix.rmdir(path)
        except OSError as error:
            if error.errno not in _NOT_EMPTY:
                raise


def _damage(error: Exception) -> str:
    """What is said of something that cannot be read. What could not be asked for now is not to be taken for damaged:
    then it is raised.
    """
    if isinstance(error, OSError) and is_unavailable(error.errno):
        raise error
    return str(error)
