"""A disk in memory that can lose power: what is written, named and synced, and what of it a loss would leave.

It stands in for the operating system under a storage: ``LocalStorage(path, posix=disk)``. Reads see everything, as from
a page cache. What is sure to be there after a loss of power is less: a file's bytes and length as of its last
fsync, and a directory's entries as of the directory's last fsync, whatever POSIX allows an implementation to do more.
``testing.power`` enumerates what may be left of the rest.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from asyncdcp.storage.posix import PAGE, FileStatus

_FIRST_FD: Final = 1 << 20
"""Descriptors of a simulated disk are numbers that no real one has."""

Image: TypeAlias = Mapping[str, bytes | None]
"""A disk's content: absolute paths, each with a file's bytes or None for a directory. The root is not listed."""


class Write(NamedTuple):
    """Bytes at an offset of a file."""

    offset: int
    data: bytes

    def apply(self, content: bytearray) -> None:
        """Carries it out; what lies between the old end and the offset becomes zeros."""
        content.extend(bytes(max(0, self.offset - len(content))))
        content[self.offset : self.offset + len(self.data)] = self.data


class Resize(NamedTuple):
    """A file's length, cut or filled up with zeros."""

    length: int

    def apply(self, content: bytearray) -> None:
        """Carries it out."""
        del content[self.length :]
        content.extend(bytes(self.length - len(content)))


NameChange: TypeAlias = "tuple[tuple[str, Node | None], ...]"
"""What one call does to the entries of a directory, all at once: names, each with what it leads to, None if nothing."""


@dataclass(eq=False)
class Node:
    """A file or directory. ``changes`` and ``names`` are what happened since it was last synced, in order."""

    number: int
    is_directory: bool
    links: int = 0
    content: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    changes: list[Write | Resize] = field(default_factory=list)
    entries: dict[str, Node] = field(default_factory=dict)
    durable_entries: dict[str, Node] = field(default_factory=dict)
    names: list[NameChange] = field(default_factory=list)

    def sync(self) -> None:
        """Makes durable what is on its way to the disk."""
        self.durable = replayed(self.durable, self.changes)
        self.durable_entries = renamed(self.durable_entries, self.names)
        self.forget()

    def forget(self) -> None:
        """A sync failed: what was on its way is still seen, and will never be written, whatever is synced later."""
        self.changes, self.names = [], []


def replayed(content: bytes, changes: Iterable[Write | Resize]) -> bytes:
    """A file's content after changes."""
    if not changes:
        return content
    after = bytearray(content)
    for change in changes:
        change.apply(after)
    return bytes(after)


def renamed(entries: dict[str, Node], names: Iterable[NameChange]) -> dict[str, Node]:
    """A directory's entries after changes."""
    after = dict(entries)
    for name, node in itertools.chain.from_iterable(names):
        if node is None:
            after.pop(name, None)
        else:
            after[name] = node
    return after


class SimulatedDisk:
    """A ``Posix`` over a disk that holds ``image``, all of it durable. Safe for threads.

    ``after`` is called after each operation that changes what is on the disk or what is durable, with its name and
    path; the disk stands still meanwhile, so it may be looked at. ``capacity`` is the most bytes that files may have
    together (ENOSPC beyond); ``direct`` says whether there is direct I/O.
    """

    def __init__(
        self,
        image: Image | None = None,
        *,
        after: Callable[[str, str], object] = lambda _operation, _path: None,
        capacity: int = 1 << 40,
        direct: bool = True,
    ) -> None:
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._fds: dict[int, tuple[Node, str]] = {}
        self._next_fd = itertools.count(_FIRST_FD)
        self._direct = direct
        self.capacity = capacity
        self.after: Callable[[str, str], object] = lambda _operation, _path: None
        self.root = Node(next(self._numbers), is_directory=True)
        for path, content in sorted((image or {}).items()):
            self._add(path, content)
        self.after = after

    def _add(self, path: str, content: bytes | None) -> None:
        parent, name = self._parent(path)
        made = Node(next(self._numbers), is_directory=content is None, links=1)
        made.content.extend(content or b"")
        made.durable = content or b""
        parent.entries[name] = parent.durable_entries[name] = made

    # ── looking at it ──

    def image(self) -> dict[str, bytes | None]:
        """What is there now, durable or not."""
        with self._lock:
            return {path: None if node.is_directory else bytes(node.content) for path, node in self.walk()}

    def walk(self) -> Iterator[tuple[str, Node]]:
        """Everything that has a name now, parents first."""
        waiting = [("", self.root)]
        while waiting:
            path, directory = waiting.pop()
            for name, node in directory.entries.items():
                yield f"{path}/{name}", node
                if node.is_directory:
                    waiting.append((f"{path}/{name}", node))

    @property
    def open_files(self) -> list[str]:
        """The paths that open descriptors were opened by."""
        with self._lock:
            return [path for _, path in self._fds.values()]

    # ── files ──

    def open(self, path: str, flags: int, /) -> int:
        with self._lock:
            parent, name = self._parent(path)
            node = parent.entries.get(name) if name else self.root
            if flags & os.O_CREAT and flags & os.O_EXCL and node is not None:
                raise _error(errno.EEXIST, path)
            if node is None and not flags & os.O_CREAT:
                raise _error(errno.ENOENT, path)
            if node is not None and flags & os.O_DIRECTORY and not node.is_directory:
                raise _error(errno.ENOTDIR, path)
            if node is None:
                node = Node(next(self._numbers), is_directory=False)
                self._rename_entries(parent, ((name, node),))
                self.after("create", path)
            fd = next(self._next_fd)
            self._fds[fd] = node, path
            return fd

    def close(self, fd: int, /) -> None:
        with self._lock:
            self._node(fd)
            del self._fds[fd]

    def set_direct(self, fd: int, /, *, on: bool) -> None:
        if on and not self._direct:
            raise _error(errno.EINVAL, self._fds[fd][1])

    def direct_alignment(self, fd: int, /) -> int:
        return 4096 if self._direct else 0

    def pwrite(self, fd: int, buffer: memoryview, offset: int, /) -> int:
        with self._lock:
            data = bytes(buffer)
            self._change(fd, Write(offset, data), "write")
            return len(data)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        with self._lock:
            content, start = self._node(fd).content, offset
            for buffer in buffers:
                part = content[offset : offset + len(buffer)]
                buffer[: len(part)] = part
                offset += len(part)
            return offset - start

    def cached_pages(self, fd: int, offset: int, length: int, /) -> int | None:
        return (offset + length - 1) // PAGE - offset // PAGE + 1

    def fallocate(self, fd: int, length: int, /) -> None:
        with self._lock:
            self._change(fd, Resize(max(length, len(self._node(fd).content))), "fallocate")

    def ftruncate(self, fd: int, length: int, /) -> None:
        with self._lock:
            self._change(fd, Resize(length), "truncate")

    def fail_sync(self, fd: int) -> None:
        """What a system does that reports a failed fsync: it gives the changes up, and the next fsync succeeds."""
        with self._lock:
            self._node(fd).forget()

    def fsync(self, fd: int, /) -> None:
        with self._lock:
            self._node(fd).sync()
            self.after("fsync", self._fds[fd][1])

    def drop_cache(self, fd: int, /) -> None:
        pass

    def fstat(self, fd: int, /) -> FileStatus:
        with self._lock:
            return _status(self._node(fd))

    def _change(self, fd: int, change: Write | Resize, operation: str) -> None:
        node = self._node(fd)
        end = change.length if isinstance(change, Resize) else change.offset + len(change.data)
        others = sum(len(file.content) for _, file in self.walk() if file is not node)
        if others + end > self.capacity and end > len(node.content):
            raise _error(errno.ENOSPC, self._fds[fd][1])
        change.apply(node.content)
        node.changes.append(change)
        self.after(operation, self._fds[fd][1])

    # ── names ──

    def stat(self, path: str, /) -> FileStatus:
        with self._lock:
            return _status(self._find(path))

    def link(self, source: str, target: str, /) -> None:
        with self._lock:
            node = self._find(source)
            parent, name = self._parent(target)
            if name in parent.entries:
                raise _error(errno.EEXIST, target)
            self._rename_entries(parent, ((name, node),))
            self.after("link", target)

    def rename_noreplace(self, source: str, target: str, /) -> None:
        with self._lock:
            node = self._find(source)
            (origin, old), (parent, new) = self._parent(source), self._parent(target)
            if new in parent.entries:
                raise _error(errno.EEXIST, target)
            if origin is not parent:
                raise _error(errno.EXDEV, target)
            self._rename_entries(parent, ((old, None), (new, node)))
            self.after("rename", target)

    def unlink(self, path: str, /) -> None:
        with self._lock:
            if self._find(path).is_directory:
                raise _error(errno.EISDIR, path)
            parent, name = self._parent(path)
            self._rename_entries(parent, ((name, None),))
            self.after("unlink", path)

    def mkdir(self, path: str, /) -> None:
        with self._lock:
            parent, name = self._parent(path)
            if not name or name in parent.entries:
                raise _error(errno.EEXIST, path)
            self._rename_entries(parent, ((name, Node(next(self._numbers), is_directory=True)),))
            self.after("mkdir", path)

    def rmdir(self, path: str, /) -> None:
        with self._lock:
            if self._find(path).entries:
                raise _error(errno.ENOTEMPTY, path)
            parent, name = self._parent(path)
            self._rename_entries(parent, ((name, None),))
            self.after("rmdir", path)

    def scan(self, path: str, /) -> dict[str, FileStatus]:
        with self._lock:
            directory = self._find(path)
            if not directory.is_directory:
                raise _error(errno.ENOTDIR, path)
            return {name: _status(node) for name, node in directory.entries.items()}

    def filesystem(self, path: str, /) -> str:
        return "simulated"

    def _rename_entries(self, directory: Node, change: NameChange) -> None:
        for name, node in change:
            before = directory.entries.pop(name, None)
            if before is not None:
                before.links -= 1
            if node is not None:
                directory.entries[name] = node
                node.links += 1
        directory.names.append(change)

    def _find(self, path: str) -> Node:
        parent, name = self._parent(path)
        node = parent.entries.get(name) if name else self.root
        if node is None:
            raise _error(errno.ENOENT, path)
        return node

    def _parent(self, path: str) -> tuple[Node, str]:
        """The directory that holds a path's last name, and that name; no name for the root."""
        *directories, name = path.strip("/").split("/")
        node = self.root
        for directory in directories:
            found = node.entries.get(directory)
            if found is None:
                raise _error(errno.ENOENT, path)
            if not found.is_directory:
                raise _error(errno.ENOTDIR, path)
            node = found
        return node, name

    def _node(self, fd: int) -> Node:
        if fd not in self._fds:
            raise _error(errno.EBADF, str(fd))
        return self._fds[fd][0]


def _status(node: Node) -> FileStatus:
    mode = stat.S_IFDIR | 0o755 if node.is_directory else stat.S_IFREG | 0o644
    return FileStatus(len(node.content), node.links, mode, node.number)


def _error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)
