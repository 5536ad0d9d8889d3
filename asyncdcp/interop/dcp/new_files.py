"""The files that one ``write_data`` makes: all of them durable in the end, or none of them left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from anyio.from_thread import BlockingPortal

from asyncdcp.interop.dcp.stream import ObjectStream
from asyncdcp.storage.local import LocalStorage
from asyncdcp.storage.posix import OS


class NewFiles:
    """The files of one ``write_data``; used on several threads."""

    def __init__(self, portal: BlockingPortal, storage: LocalStorage, token: str) -> None:
        self._portal = portal
        self._storage = storage
        self._token = token
        self._finished: list[str] = []

    @contextmanager
    def create(self, name: str, length_hint: int, ahead: int) -> Iterator[ObjectStream]:
        """A new file, finished when the block ends. Where there is one of that name, which may be the old
        checkpoint's, it gets another.
        """
        try:
            stream = ObjectStream(self._portal, self._storage, name, length_hint, ahead)
        except FileExistsError:
            stem, dot, suffix = name.rpartition(".")
            name = f"{stem}_{self._token}{dot}{suffix}"
            stream = ObjectStream(self._portal, self._storage, name, length_hint, ahead)
        try:
            yield stream
            stream.finish()
            self._finished.append(name)
        except BaseException:
            stream.abort()
            raise

    def barrier(self) -> None:
        self._portal.call(self._storage.barrier)

    @contextmanager
    def removed_on_error(self) -> Iterator[None]:
        """Removes what was finished if the block raises; it must have ended by then."""
        try:
            yield
        except BaseException:
            self._portal.call(self._storage.delete, self._finished)
            raise


class Unsynced(OS):
    """A system that syncs nothing."""

    def fsync(self, fd: int, /) -> None:
        pass
