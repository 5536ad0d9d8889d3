"""A file of a LocalStorage being written: direct I/O where it can be had, the page cache elsewhere.

Direct I/O is refused in several places: by statx, when the flag is set, at the first write. Each time the file falls
back to buffered I/O for good, and nobody above notices but by ``alignment``.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from enum import Enum
from typing import Final

from anyio import CapacityLimiter

from asyncdcp.errors import Closed, InvalidOption
from asyncdcp.storage.files import (
    MIN_ALIGNMENT,
    NOTHING_WRITTEN,
    REFUSED,
    Descriptor,
    address,
    aligned,
    tolerated,
    translated,
)
from asyncdcp.storage.port import Buffer, check_finish
from asyncdcp.storage.posix import Posix
from asyncdcp.threads import on_executor, on_thread

_NO_FALLOCATE: Final = REFUSED | {errno.ENOSYS}


class _State(Enum):
    NEW = "new"
    BEGUN = "begun"
    FINISHING = "being finished"
    FINISHED = "finished"
    ABORTED = "aborted"


class LocalWriter:
    """An ``ObjectWriter`` over one file, which has its final name from the beginning."""

    def __init__(self, path: str, posix: Posix, limiter: CapacityLimiter) -> None:
        self._path = path
        self._posix = posix
        self._limiter = limiter
        self._file = Descriptor(posix, path)
        self._state = _State.NEW
        self._alignment = 1
        self._writing = 0
        self._failed = ""  # what a write failed of; not the error itself, whose frames hold its buffer

    @property
    def alignment(self) -> int:
        return self._alignment

    def begin(self, length_hint: int, *, direct_io: bool) -> None:
        """Creates the file and allocates ``length_hint`` bytes; blocks. If it raises, ``abort`` removes what it made.

        O_DIRECT is set afterwards: an open that is to create refuses the flag on some filesystems only once the file
        is there, and a second, exclusive try would take that file for somebody else's.
        """
        fd = self._file.open(os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        self._state = _State.BEGUN
        alignment = self._posix.direct_alignment(fd) if direct_io else 0
        if alignment:
            with tolerated(REFUSED):
                self._posix.set_direct(fd, on=True)
                self._alignment = max(MIN_ALIGNMENT, alignment)
        if length_hint > 0:
            with tolerated(_NO_FALLOCATE):
                self._posix.fallocate(fd, length_hint)

    async def write(self, offset: int, buffer: Buffer) -> None:
        self._check(offset, buffer)
        self._writing += 1
        try:
            with translated("write", self._path):
                await on_thread(self._limiter, self._write_all, offset, buffer)
        except BaseException as error:
            self._failed = str(error) or type(error).__name__
            raise
        finally:
            self._writing -= 1

    async def finish(self, length: int) -> None:
        self._check_begun()
        check_finish(self._path, length, self._writing, self._failed)
        self._state = _State.FINISHING
        with translated("finish", self._path):
            await on_executor(self._finish, length)
        self._state = _State.FINISHED

    async def abort(self) -> None:
        if self._state in (_State.BEGUN, _State.FINISHING):
            with translated("remove", self._path):
                await on_executor(self._discard)

    def _check(self, offset: int, buffer: Buffer) -> None:
        self._check_begun()
        if offset < 0:
            raise InvalidOption(f"offset is {offset}; it takes 0 or more", path=self._path)
        alignment = self._alignment
        if alignment > 1 and not aligned(alignment, offset, [buffer]):
            place = f"{len(buffer)} bytes at offset {offset} and address {address(buffer):#x}"
            raise InvalidOption(f"a write of {place} to {self._path} is not aligned to {alignment}", path=self._path)

    def _check_begun(self) -> None:
        if self._state is not _State.BEGUN or not self._file.is_open:
            raise Closed(f"{self._path} is {self._state.value} or closed", path=self._path)

    def _write_all(self, offset: int, buffer: Buffer) -> None:
        with self._file.use() as fd:
            done = 0
            while done < len(buffer):
                done = self._write_some(fd, offset, buffer, done)

    def _write_some(self, fd: int, offset: int, buffer: Buffer, done: int) -> int:
        """One write from ``done`` on; returns where to go on, which for direct I/O is aligned again (or the end).

        So an odd end of a short write is written a second time. If a direct write gets nowhere, the file falls back.
        """
        alignment = self._alignment
        try:
            end = done + self._posix.pwrite(fd, buffer[done:], offset + done)
        except OSError as error:
            if alignment == 1 or error.errno not in REFUSED:
                raise
            end = done
        if end == len(buffer):
            return end
        end -= end % alignment
        if end <= done and alignment == 1:
            raise OSError(errno.EIO, NOTHING_WRITTEN)
        if end <= done:
            self._posix.set_direct(fd, on=False)
            self._alignment = 1
        return max(end, done)

    def _finish(self, length: int) -> None:
        """Cuts off what was padded or allocated too much, and syncs.

        Whatever fails, the file is closed and never synced again.
        """
        try:
            with self._file.use() as fd:
                self._posix.ftruncate(fd, length)
                self._posix.fsync(fd)
                if self._alignment == 1:
                    with suppress(OSError):
                        self._posix.drop_cache(fd)
        finally:
            self._file.close()

    def _discard(self) -> None:
        with suppress(OSError):
            self._file.close()
        with suppress(FileNotFoundError):
            self._posix.unlink(self._path)
        self._state = _State.ABORTED
