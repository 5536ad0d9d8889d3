"""What reading and writing one file have in common: its descriptor, its errors, what direct I/O asks for, and buffers
that it reads into fast.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Final

from asyncdcp.errors import Closed, InvalidOption, StorageError, storage_error
from asyncdcp.storage.port import Buffer
from asyncdcp.storage.posix import Posix

MIN_ALIGNMENT: Final = 4096

REFUSED: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP})
"""How a system says that it does not do such a thing, as opposed to having failed."""
NOTHING_WRITTEN: Final = "the system wrote nothing and gave no reason"
_HUGE_PAGE = 2 << 20


def absolute(path: str | os.PathLike[str]) -> str:
    """The path from the root on. ``InvalidOption`` for what is none, or goes on from a directory that was deleted."""
    name = os.fspath(path)
    if not isinstance(name, str) or not name or "\0" in name:
        raise InvalidOption(f"path is {name!r}; it takes the path of a directory")
    try:
        return os.path.abspath(name)
    except FileNotFoundError as error:
        raise InvalidOption(
            f"path is {name!r}, and the current directory was deleted: change to one that is there, or give a path "
            "that begins with /"
        ) from error


@contextmanager
def translated(operation: str, path: str, *passing: type[OSError]) -> Iterator[None]:
    """The one place where the system's errors become asyncdcp's; those of ``passing`` go through as they are."""
    try:
        yield
    except OSError as error:
        if isinstance(error, (StorageError, *passing)):
            raise
        raise storage_error(f"cannot {operation} {path}: {error.strerror or error}", path, error.errno) from error


class Descriptor:
    """A file descriptor shared by threads. ``close`` takes effect once the last call that uses it has ended.

    So no call ever meets a number that the system has given to another file meanwhile.
    """

    def __init__(self, posix: Posix, path: str) -> None:
        self._posix = posix
        self._path = path
        self._lock = Lock()
        self._fd = -1
        self._users = 0
        self._closing = False

    def open(self, flags: int) -> int:
        self._fd = self._posix.open(self._path, flags)
        return self._fd

    @property
    def is_open(self) -> bool:
        return self._fd >= 0 and not self._closing

    @contextmanager
    def use(self) -> Iterator[int]:
        with self._lock:
            if not self.is_open:
                raise Closed(f"{self._path} is closed", path=self._path)
            self._users += 1
        try:
            yield self._fd
        finally:
            with self._lock:
                self._users -= 1
            self._close_unused()

    def close(self) -> None:
        """Closes, at the latest when the last call ends.

        Safe to call twice. The number is given up even if this raises.
        """
        self._closing = True
        self._close_unused()

    def _close_unused(self) -> None:
        with self._lock:
            if not self._closing or self._users or self._fd < 0:
                return
            fd, self._fd = self._fd, -1
        self._posix.close(fd)


def write_all(posix: Posix, fd: int, data: bytes, offset: int = 0) -> None:
    """Writes all of ``data``, in as many calls as that takes."""
    done = 0
    while done < len(data):
        count = posix.pwrite(fd, memoryview(data)[done:], offset + done)
        if count == 0:
            raise OSError(errno.EIO, NOTHING_WRITTEN)
        done += count


@contextmanager
def tolerated(errnos: frozenset[int]) -> Iterator[None]:
    """Ends the block quietly where the system says that it does not do such a thing."""
    try:
        yield
    except OSError as error:
        if error.errno not in errnos:
            raise


def aligned(alignment: int, offset: int, views: Sequence[Buffer]) -> bool:
    lengths = (offset, *map(len, views))
    return not any(n % alignment for n in lengths) and not any(address(view) % alignment for view in views if view)


class _PyBuffer(ctypes.Structure):
    """``Py_buffer`` of the C API; only ``buf`` is looked at."""

    _fields_ = (("buf", ctypes.c_void_p), ("others", ctypes.c_void_p * 15))


def address(view: Buffer) -> int:
    """Where the bytes lie in memory, of read-only ones too, which ``ctypes`` objects cannot be made from."""
    raw = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(raw), 0)
    try:
        return int(raw.buf or 0)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(raw))


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Makes the names in a directory durable that no Storage keeps. Blocks."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def io_buffer(nbytes: int) -> memoryview:
    """``nbytes`` of private memory on a border of 2 MiB, in huge pages where the system gives them.

    A direct read into scattered pages of 4 KiB is cut into thousands of segments: measured, half the speed. The memory
    goes with the last view of it.
    """
    memory = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    start = -address % _HUGE_PAGE
    return memoryview(memory)[start : start + nbytes]
