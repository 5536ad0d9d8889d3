"""The calls of the operating system that a LocalStorage makes, one method each, and nothing else.

No method decides anything: each is one call (or one call and the reading of its answer), and each raises ``OSError``
with the system's errno as Python does, those made through ctypes too. So a test or a simulator of power loss can
stand in for the operating system below ``local.py``, by the ``Posix`` protocol or by a subclass of ``OS``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

PAGE: Final = mmap.PAGESIZE
IOV_MAX: Final = os.sysconf("SC_IOV_MAX")

_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_RENAME_NOREPLACE: Final = 1
# struct statx of linux/stat.h: stx_mask at byte 0, stx_dio_mem_align at 152, stx_dio_offset_align at 156.
_STATX_DIOALIGN: Final = 0x2000
_STATX_SIZE: Final = 256
# One number on every architecture but alpha; Linux 6.5 and later.
_SYS_CACHESTAT: Final = 451

_LEADS_NOWHERE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})

_libc: Final = ctypes.CDLL(None, use_errno=True)


class FileStatus(NamedTuple):
    """What of ``struct stat`` is looked at: length in bytes, hard links, type and permission bits, inode, when the
    content was last changed (seconds since the epoch, by the clock of whoever keeps the file), and the device.
    """

    size: int
    links: int
    mode: int
    inode: int
    modified: float = 0.0
    device: int = 0


class Posix(Protocol):
    """The operating system as a LocalStorage sees it. Methods block, and are called on any thread."""

    def open(self, path: str, flags: int, /) -> int: ...
    def close(self, fd: int, /) -> None: ...
    def set_direct(self, fd: int, /, *, on: bool) -> None:
        """Turns O_DIRECT of an open file on or off; EINVAL where the filesystem has no direct I/O."""
        ...

    def direct_alignment(self, fd: int, /) -> int:
        """The alignment in bytes that direct I/O on this file needs.

        0 if it has none; 4,096 where the system does not say.
        """
        ...

    def pwrite(self, fd: int, buffer: memoryview, offset: int, /) -> int: ...
    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int: ...
    def cached_pages(self, fd: int, offset: int, length: int, /) -> int | None:
        """How many pages of the range the page cache holds; None where the system does not say. Reads nothing ahead."""
        ...

    def fallocate(self, fd: int, length: int, /) -> None:
        """Allocates the file's first ``length`` bytes and makes it that long.

        Never by writing zeros, as glibc's would.
        """
        ...

    def ftruncate(self, fd: int, length: int, /) -> None: ...
    def fsync(self, fd: int, /) -> None: ...
    def drop_cache(self, fd: int, /) -> None:
        """Asks that the page cache forget the file's clean pages."""
        ...

    def fstat(self, fd: int, /) -> FileStatus: ...
    def stat(self, path: str, /) -> FileStatus: ...
    def link(self, source: str, target: str, /) -> None: ...
    def rename_noreplace(self, source: str, target: str, /) -> None: ...
    def unlink(self, path: str, /) -> None: ...
    def mkdir(self, path: str, /) -> None: ...
    def rmdir(self, path: str, /) -> None: ...
    def scan(self, path: str, /) -> dict[str, FileStatus]:
        """The directory's entries, symbolic links followed; without those that vanish meanwhile or lead nowhere."""
        ...

    def filesystem(self, path: str, /) -> str:
        """The type of the filesystem that holds the path, as the mount table names it; it need not exist yet."""
        ...


class OS:
    """The real one: Linux."""

    def open(self, path: str, flags: int, /) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def close(self, fd: int, /) -> None:
        os.close(fd)

    def set_direct(self, fd: int, /, *, on: bool) -> None:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)

    def direct_alignment(self, fd: int, /) -> int:
        answer = (ctypes.c_uint32 * (_STATX_SIZE // 4))()
        if not hasattr(_libc, "statx") or _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer) != 0:
            return 4096
        memory, offset = answer[152 // 4], answer[156 // 4]
        if not answer[0] & _STATX_DIOALIGN:
            return 4096
        return max(memory, offset) if offset else 0

    def pwrite(self, fd: int, buffer: memoryview, offset: int, /) -> int:
        return os.pwrite(fd, buffer, offset)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        return os.preadv(fd, buffers, offset, flags)

    def cached_pages(self, fd: int, offset: int, length: int, /) -> int | None:
        asked, answer = (ctypes.c_uint64 * 2)(offset, length), (ctypes.c_uint64 * 5)()
        number, descriptor, flags = ctypes.c_long(_SYS_CACHESTAT), ctypes.c_uint(fd), ctypes.c_uint(0)
        return None if _libc.syscall(number, descriptor, asked, answer, flags) else int(answer[0])

    def fallocate(self, fd: int, length: int, /) -> None:
        while _libc.fallocate64(fd, 0, ctypes.c_int64(0), ctypes.c_int64(length)) != 0:
            if ctypes.get_errno() != errno.EINTR:
                raise _error()

    def ftruncate(self, fd: int, length: int, /) -> None:
        os.ftruncate(fd, length)

    def fsync(self, fd: int, /) -> None:
        os.fsync(fd)

    def drop_cache(self, fd: int, /) -> None:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def fstat(self, fd: int, /) -> FileStatus:
        return _status(os.fstat(fd))

    def stat(self, path: str, /) -> FileStatus:
        return _status(os.stat(path))

    def link(self, source: str, target: str, /) -> None:
        os.link(source, target)

    def rename_noreplace(self, source: str, target: str, /) -> None:
        old, new, flags = os.fsencode(source), os.fsencode(target), ctypes.c_uint(_RENAME_NOREPLACE)
        if not hasattr(_libc, "renameat2"):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), source, None, target)
        if _libc.renameat2(_AT_FDCWD, old, _AT_FDCWD, new, flags) != 0:
            raise _error(source, None, target)

    def unlink(self, path: str, /) -> None:
        os.unlink(path)

    def mkdir(self, path: str, /) -> None:
        os.mkdir(path)

    def rmdir(self, path: str, /) -> None:
        os.rmdir(path)

    def scan(self, path: str, /) -> dict[str, FileStatus]:
        found = {}
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    found[entry.name] = _status(entry.stat())
                except OSError as error:
                    if error.errno not in _LEADS_NOWHERE:
                        raise
        return found

    def filesystem(self, path: str, /) -> str:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
            return filesystem_of(os.path.realpath(path), table.read())


SYSTEM: Final[Posix] = OS()


def filesystem_of(path: str, mountinfo: str) -> str:
    """The filesystem type of the longest mount point above an absolute path; of equals the last, which hides others.

    ``mountinfo`` is as proc(5) describes it: the mount point is a line's fifth field, the type follows its lone "-".
    """
    best, kind = -1, "unknown"
    for line in mountinfo.splitlines():
        mount, _, source = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), mount.split(" ")[4])
        if len(point) >= best and f"{path}/".startswith(f"{point.rstrip('/')}/"):
            best, kind = len(point), source.split(" ", 1)[0]
    return kind


def _status(status: os.stat_result) -> FileStatus:
    modified = status.st_mtime
    return FileStatus(status.st_size, status.st_nlink, status.st_mode, status.st_ino, modified, status.st_dev)


def _error(*names: str | None) -> OSError:
    """The error of the ctypes call just made on this thread."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), *names)
