"""The files that one ``write_data`` makes: all of them durable in the end, or none of them left.

Blocking code writes each front to back, while the storage layer carries its bytes to the disk: ``torch.save`` hands a
tensor's memory to ``write`` as it lies, so each byte is copied once, into a block of aligned memory; full blocks are
written by direct I/O, several at a time, while the next ones are filled.
"""

from __future__ import annotations

import ctypes
import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

from anyio.from_thread import BlockingPortal

from asyncdcp.format.blocks import SLAB_BYTES
from asyncdcp.storage.files import address, io_buffer
from asyncdcp.storage.local import LocalStorage
from asyncdcp.storage.port import ObjectWriter, Storage
from asyncdcp.storage.posix import OS

_MIN_BLOCKS = 4
_LONG = 64 << 10


class ObjectStream(io.RawIOBase):
    """A new object of ``storage``, to be written to on one thread and ended by ``finish`` or ``abort``.

    ``portal`` is of the loop on which the storage is used. At most ``ahead`` bytes, and at least four blocks, are in
    memory. ``write`` raises what an earlier write to the disk failed with.
    """

    def __init__(self, portal: BlockingPortal, storage: Storage, name: str, length_hint: int, ahead: int) -> None:
        super().__init__()
        self.name = name
        self._portal = portal
        self._writer: ObjectWriter = portal.call(storage.create, name, length_hint)
        self._blocks = max(_MIN_BLOCKS, ahead // SLAB_BYTES)
        self._pending: deque[tuple[Future[Any], memoryview]] = deque()
        self._block = memoryview(b"")
        self._filled = 0
        self._written = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._written + self._filled

    def write(self, data: Any) -> int:
        """Takes all of ``data``, which is not looked at afterwards."""
        source = memoryview(data).cast("B")
        done = 0
        while done < len(source):
            if self._filled == len(self._block):
                self._next_block()
            count = min(len(source) - done, len(self._block) - self._filled)
            _copy(self._block[self._filled : self._filled + count], source[done : done + count])
            self._filled += count
            done += count
        return done

    def finish(self) -> int:
        """Writes what is left and makes the bytes durable; the length. Only ``abort`` may follow if this raises."""
        length = self.tell()
        if self._filled:
            alignment = self._writer.alignment
            self._submit(self._block[: -(-self._filled // alignment) * alignment])
        while self._pending:
            self._reclaim()
        self._portal.call(self._writer.finish, length)
        return length

    def abort(self) -> None:
        """Removes the object; does nothing after a ``finish`` that returned."""
        while self._pending:
            with suppress(Exception):  # the first one was raised, or the caller has an error of its own
                self._reclaim()
        self._portal.call(self._writer.abort)

    def _next_block(self) -> None:
        if self._filled:
            self._submit(self._block)
        if len(self._pending) < self._blocks:
            self._block = io_buffer(SLAB_BYTES)
        else:
            self._block = self._reclaim()
        self._filled = 0

    def _submit(self, block: memoryview) -> None:
        self._pending.append((self._portal.start_task_soon(self._writer.write, self._written, block), self._block))
        self._written += self._filled
        self._filled = 0
        self._block = memoryview(b"")

    def _reclaim(self) -> memoryview:
        """The block of the oldest write, once that has ended; raises what it failed with."""
        future, block = self._pending.popleft()
        future.result()
        return block


class Unclosing(io.RawIOBase):
    """What a transform writes to: its ``close`` cascades, and the next entry goes to the same file."""

    def __init__(self, stream: ObjectStream) -> None:
        super().__init__()
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._stream.write(data)


def _copy(target: memoryview, source: memoryview) -> None:
    """Long copies release the GIL."""
    if len(source) < _LONG:
        target[:] = source
    else:
        ctypes.memmove(address(target), address(source), len(source))


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
