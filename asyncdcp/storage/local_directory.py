"""The directory of a LocalStorage and all that leads to it: how they are made, and how their entries become durable."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from threading import Lock
from typing import Final

from asyncdcp.errors import StorageError
from asyncdcp.storage.files import Descriptor, tolerated
from asyncdcp.storage.posix import Posix

_CLOSED: Final = frozenset({errno.EACCES, errno.EPERM})
"""How the system refuses to open a directory above that others made, and that is not ours to read."""


class LocalDirectory:
    """The directory: made with its ancestors, and made durable with the entries that lead to it. Blocks; any thread.

    Who made a directory may have died before it was synced; so the first sync takes in all that is above this one, up
    to the root of the filesystem, whoever made it. What has nothing new costs a tenth of a millisecond.
    """

    def __init__(self, path: str, posix: Posix) -> None:
        self._path = path
        self._posix = posix
        self._lock = Lock()
        self._made = False
        self._made_in: set[str] = set()
        """Ancestors in which a directory was made here, or may have been: they have to be synced."""
        self._others: set[str] | None = None
        """More to be synced if they can be; None before the first sync, which finds them."""
        self._failed: BaseException | None = None

    def make(self) -> None:
        """Makes the directory and every missing ancestor; the next ``sync`` makes them durable."""
        missing, path = [], self._path
        while self._device(path) is None:
            missing.append(path)
            path = os.path.dirname(path)
        for path in reversed(missing):
            with self._lock:
                self._made_in.add(os.path.dirname(path))
                self._make_one(path)
        self._made = True

    def _make_one(self, path: str) -> None:
        try:
            self._posix.mkdir(path)
        except FileExistsError:  # another has made it meanwhile
            if os.path.islink(path) and not os.path.exists(path):
                message = f"{path} is a link to {os.readlink(path)}, which is not there; make that, or remove the link"
                raise StorageError(message, path=path, errno=errno.ENOENT) from None

    def check(self) -> None:
        """Raises if a sync has failed before: the system reports an error once, and the next fsync proves nothing."""
        if self._failed is not None:
            message = f"an earlier sync of {self._path} failed: {self._failed}"
            raise StorageError(message, path=self._path, errno=getattr(self._failed, "errno", None)) from self._failed

    def sync(self) -> None:
        """Syncs the directory, then the ancestors due, innermost first.

        One that is not there, and that nobody here made, is nothing to sync.
        """
        with self._lock:
            self.check()
            if not self._made and self._device(self._path) is None:
                return
            self._sync(self._path)
            if self._others is None:
                self._others = set(self._ancestors())
            for path in sorted(self._made_in | self._others, key=len, reverse=True):
                with tolerated(frozenset() if path in self._made_in else _CLOSED):
                    self._sync(path)
                self._made_in.discard(path)
                self._others.discard(path)

    def _ancestors(self) -> Iterator[str]:
        """Every directory above, up to the root of its filesystem."""
        path, device = self._path, self._device(self._path)
        while path != (parent := os.path.dirname(path)) and self._device(parent) == device:
            yield parent
            path = parent

    def _device(self, path: str) -> int | None:
        """The device that holds a directory or file; None if it does not exist."""
        try:
            return self._posix.stat(path).device
        except FileNotFoundError:
            return None

    def _sync(self, path: str) -> None:
        directory = Descriptor(self._posix, path)
        fd = directory.open(os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._posix.fsync(fd)
        except BaseException as error:
            # EINVAL is how filesystems answer whose directories need no sync, or have none to offer (CIFS).
            if not isinstance(error, OSError) or error.errno != errno.EINVAL:
                self._failed = error
                raise
        finally:
            directory.close()
