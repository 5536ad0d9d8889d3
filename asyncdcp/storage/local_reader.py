"""A file of a LocalStorage being read.

From the page cache what is there, the rest by direct I/O where it can be had.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from typing import Final

from anyio import CapacityLimiter

from asyncdcp.errors import StorageError
from asyncdcp.storage.files import MIN_ALIGNMENT, REFUSED, Descriptor, aligned, tolerated, translated
from asyncdcp.storage.port import Buffer, Fetch, check_length, check_use
from asyncdcp.storage.posix import IOV_MAX, PAGE, Posix
from asyncdcp.threads import on_executor, on_thread

_STEP: Final = 1 << 20
"""What is read from the page cache before it is looked at: it fits into a core's own cache."""


class LocalReader:
    """An ``ObjectReader`` over one file: a buffered descriptor, and a direct one where the filesystem has it."""

    def __init__(self, path: str, posix: Posix, limiter: CapacityLimiter) -> None:
        self._path = path
        self._posix = posix
        self._limiter = limiter
        self._file = Descriptor(posix, path)
        self._direct = Descriptor(posix, path)
        self._size = 0
        self._alignment = 1
        self._nowait = True

    @property
    def size(self) -> int:
        return self._size

    @property
    def alignment(self) -> int:
        return self._alignment

    def begin(self, *, direct_io: bool) -> None:
        """Opens.

        Blocks. If it raises, ``aclose`` closes what it opened. O_NONBLOCK, so that a FIFO is refused, not waited for.
        """
        fd = self._file.open(os.O_RDONLY | os.O_NONBLOCK)
        status = self._posix.fstat(fd)
        if not stat.S_ISREG(status.mode):
            raise StorageError(f"{self._path} is not a regular file", path=self._path)
        self._size = status.size
        alignment = self._posix.direct_alignment(fd) if direct_io else 0
        if alignment:
            with tolerated(REFUSED):
                self._direct.open(os.O_RDONLY | os.O_NONBLOCK | os.O_DIRECT)
                self._alignment = max(MIN_ALIGNMENT, alignment)

    async def read(self, offset: int, buffers: Sequence[Buffer]) -> int:
        expected = self._expected(offset, buffers)
        with translated("read", self._path):
            await on_thread(self._limiter, self._fill, offset, buffers, expected)
        return expected

    async def read_cached(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        expected = self._expected(offset, buffers)
        if not self._nowait:
            return False
        with translated("read", self._path):
            return await on_thread(self._limiter, self._fill_cached, offset, buffers, expected)

    async def fetch(self, *reads: Fetch) -> None:
        await on_thread(self._limiter, self._carry_out, [(read, *self._lengths(read)) for read in reads])

    def _lengths(self, read: Fetch) -> tuple[int, int]:
        return self._expected(read.offset, read.cached), self._expected(read.offset, read.otherwise)

    def _carry_out(self, reads: Sequence[tuple[Fetch, int, int]]) -> None:
        for read, within, expected in reads:
            with translated("read", self._path):
                found = self._nowait and self._fill_cached(read.offset, read.cached, within, read.seen)
                if not found:
                    self._fill(read.offset, read.otherwise, expected)
            read.then(found)

    async def aclose(self) -> None:
        with translated("close", self._path):
            await on_executor(self.close)

    def _expected(self, offset: int, buffers: Sequence[Buffer]) -> int:
        check_use(self._path, "offset", offset, is_open=self._file.is_open)
        return max(0, min(sum(map(len, buffers)), self._size - offset))

    def load(self, limit: int) -> bytes:
        """The whole file, if it has at most ``limit`` bytes; blocks. For small files."""
        check_length(self._path, self._size, limit)
        data = bytearray(self._size)
        self._fill(0, [memoryview(data)], self._size)
        return bytes(data)

    def close(self) -> None:
        """Closes; blocks."""
        try:
            self._direct.close()
        finally:
            self._file.close()

    def _fill(self, offset: int, buffers: Sequence[Buffer], expected: int) -> None:
        filled = 0
        while filled < expected:
            count = self._read_some(offset + filled, _after(buffers, filled))
            if count == 0:
                raise EOFError(f"{self._path} ends at {offset + filled} and had {self._size} bytes when it was opened")
            filled += count

    def _read_some(self, offset: int, views: list[Buffer]) -> int:
        alignment = self._alignment
        if alignment > 1 and aligned(alignment, offset, views):
            try:
                with self._direct.use() as fd:
                    return self._posix.preadv(fd, views, offset, 0)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                self._alignment = 1
        with self._file.use() as fd:
            return self._posix.preadv(fd, views, offset, 0)

    def _fill_cached(
        self,
        offset: int,
        buffers: Sequence[Buffer],
        expected: int,
        seen: Callable[[int], object] | None = None,
    ) -> bool:
        """Whether the page cache has had it all. With ``seen`` it is read in steps that the processor's caches hold."""
        step = expected if seen is None else _STEP
        with self._file.use() as fd:
            if expected and not self._seems_cached(fd, offset, expected):
                return False
            filled = 0
            while filled < expected:
                count = self._read_nowait(fd, offset + filled, _after(buffers, filled, step))
                if count == 0:
                    return False
                filled += count
                if seen is not None:
                    seen(filled)
        return True

    def _seems_cached(self, fd: int, offset: int, length: int) -> bool:
        """Asks first: a read with RWF_NOWAIT that finds nothing makes the kernel read the whole range ahead.

        With direct reads to follow that would be every byte twice. Where the kernel does not say (before 6.5), one
        byte is tried, which reads one page ahead at most.
        """
        pages = self._posix.cached_pages(fd, offset, length)
        if pages is None:
            return self._read_nowait(fd, offset, [memoryview(bytearray(1))]) == 1
        return pages > (offset + length - 1) // PAGE - offset // PAGE

    def _read_nowait(self, fd: int, offset: int, views: list[Buffer]) -> int:
        """The bytes read, 0 if that would have to wait."""
        try:
            return self._posix.preadv(fd, views, offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            self._nowait = False
            return 0


def _after(buffers: Sequence[Buffer], filled: int, most: int | None = None) -> list[Buffer]:
    """What of the buffers is still to be filled, ``most`` bytes of it, and as many buffers as one call takes."""
    views: list[Buffer] = []
    for buffer in buffers:
        if filled < len(buffer) and len(views) < IOV_MAX and most != 0:
            views.append(buffer[filled:] if most is None else buffer[filled : filled + most])
            most = None if most is None else most - len(views[-1])
        filled = max(0, filled - len(buffer))
    return views
