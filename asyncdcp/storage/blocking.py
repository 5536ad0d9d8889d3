"""A Storage made of plain functions that block: what a storage of one's own is most simply made of.

The functions are called on threads. Here is all the rest of what the port asks for: checks, errors, buffers, and what
becomes of a call whose caller is cancelled. An object that is written is spooled to a local temporary file, and stored
when it is whole.
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import IO, Final, TypeVar

from anyio import CapacityLimiter

from asyncdcp.errors import AsyncDCPError, CommitUnknown, CorruptCheckpoint, StorageError, storage_error
from asyncdcp.storage.port import (
    TEMPORARY,
    Buffer,
    Fetch,
    StorageInfo,
    already_there,
    check_finish,
    check_name,
    check_removable,
    check_use,
    read_small,
)
from asyncdcp.threads import on_executor, on_thread

T = TypeVar("T")

_TRANSFERS: Final = 4


class BlockingStorage(ABC):
    """A ``Storage`` by way of the abstract methods below, and ``info``, which says where it is.

    They are called on threads, several at once, with names that were checked. ``FileNotFoundError`` of what reads or
    removes an object means that there is none; any other error becomes a ``StorageError`` that names the operation and
    the object. It never travels to the background process, unless it is given a ``spec``: saves to it run on a thread.
    """

    def __init__(self, info: StorageInfo) -> None:
        self.info = info
        self._writing: set[str] = set()
        self._unseen: dict[str, int] = {}

    # ── what it is made of ──────────────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Every object's name and length in bytes; empty where the place does not exist."""

    @abstractmethod
    def read_range(self, name: str, begin: int, end: int) -> bytes:
        """The bytes ``begin <= i < end`` of an object, which has so many."""

    @abstractmethod
    def store(self, name: str, file: IO[bytes]) -> None:
        """Stores what the file holds, from its beginning on, as an object that is not there yet; durable on return.

        What is left of it where this raises is removed by ``remove``.
        """

    @abstractmethod
    def store_new(self, name: str, data: bytes) -> bool:
        """Stores a small object, whole and durable, if there is none of that name: whether it did. Of several that try
        at once, in whatever processes, one does: that is how a checkpoint is committed once.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Removes an object."""

    def size_of(self, name: str) -> int:
        """An object's length in bytes."""
        sizes = self.sizes()
        if name not in sizes:
            raise FileNotFoundError(name)
        return sizes[name]

    # ── the port ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def create(self, name: str, length_hint: int) -> BlockingWriter:
        path = self.path_of(check_name(name))
        if name in self._writing:
            raise already_there(path)
        self._writing.add(name)
        try:
            if await self._is_there(name):
                raise already_there(path)
            return BlockingWriter(self, name)
        except BaseException:
            self._writing.discard(name)
            raise

    async def put(self, name: str, data: bytes) -> None:
        if not await self.claim(name, data):
            raise already_there(self.path_of(name))
        self._unseen[name] = len(data)

    async def claim(self, name: str, data: bytes) -> bool:
        check_name(name)
        try:
            return await self._run("claim", name, lambda: self.store_new(name, data))
        except StorageError as error:
            return await self._was_claimed(name, data, error)

    async def _was_claimed(self, name: str, data: bytes, error: StorageError) -> bool:
        """A storage can carry out what it then reports as failed: what is there tells. Part of it is nobody's claim."""
        try:
            there = await self.get(name, len(data))
        except CorruptCheckpoint:  # longer, and so another's
            return False
        except FileNotFoundError:
            raise error from error.__cause__
        except (StorageError, EOFError) as unknown:
            path = self.path_of(name)
            raise CommitUnknown(f"whether {path} was claimed cannot be told ({error}): {unknown}", path=path) from error
        if there != data and data.startswith(there):
            raise error from error.__cause__
        return there == data

    async def barrier(self) -> None:
        """Looks whether what was finished or put is there, as long as it was."""
        for name, size in list(self._unseen.items()):
            found = await self._run("verify", name, lambda name=name: self.size_of(name))  # type: ignore[misc]
            if found != size:
                path = self.path_of(name)
                raise StorageError(f"{path} has {found} bytes, and {size} were stored", path=path)
            self._unseen.pop(name, None)

    async def get(self, name: str, limit: int) -> bytes:
        return await read_small(self, name, limit)

    async def open(self, name: str) -> BlockingReader:
        check_name(name)
        return BlockingReader(self, name, await self._run("open", name, lambda: self.size_of(name), FileNotFoundError))

    async def list(self) -> dict[str, int]:
        return {name: size for name, size in (await self._all()).items() if not name.startswith(".")}

    async def temporaries(self) -> dict[str, str]:
        found = ((name, TEMPORARY.fullmatch(name)) for name in await self._all())
        return {name: match[1] for name, match in found if match is not None}

    async def delete(self, names: Sequence[str]) -> None:
        for name in names:
            check_removable(name)
        for name in names:
            self._unseen.pop(name, None)
            with suppress(FileNotFoundError):
                await self._run("delete", name, lambda name=name: self.remove(name), FileNotFoundError)  # type: ignore[misc]

    # ── how ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def path_of(self, name: str) -> str:
        """What messages call an object."""
        return f"{self.info.location}/{name}"

    def ended(self, name: str, size: int | None) -> None:
        """A writer has come to its end, with an object of ``size`` bytes, or None; called by it."""
        self._writing.discard(name)
        if size is not None:
            self._unseen[name] = size

    @cached_property
    def limiter(self) -> CapacityLimiter:
        """Of the threads that move bytes. Made at its first use: that is on the engine's loop."""
        return CapacityLimiter(_TRANSFERS)

    async def _is_there(self, name: str) -> bool:
        try:
            await self._run("create", name, lambda: self.size_of(name), FileNotFoundError)
        except FileNotFoundError:
            return False
        return True

    async def _all(self) -> dict[str, int]:
        return await self._run("list", "", self.sizes)

    async def _run(self, operation: str, name: str, function: Callable[[], T], *passing: type[OSError]) -> T:
        def call() -> T:
            with translated(operation, self.path_of(name), *passing):
                return function()

        return await on_executor(call)


class BlockingWriter:
    """An ``ObjectWriter``: a local temporary file until ``finish``."""

    def __init__(self, storage: BlockingStorage, name: str) -> None:
        self._storage = storage
        self._name = name
        self._path = storage.path_of(name)
        with translated("spool", self._path):
            self._spool = tempfile.TemporaryFile()  # noqa: SIM115  # closed by finish or abort
        self._open = True
        self._finishing = False
        self._writing = 0
        self._failed = ""  # what it failed of; not the error itself, whose frames hold its buffer
        self._stored = False

    @property
    def alignment(self) -> int:
        return 1

    async def write(self, offset: int, buffer: Buffer) -> None:
        self._check("offset", offset)
        self._writing += 1
        try:
            await on_thread(self._storage.limiter, self._write, offset, buffer)
        except BaseException as error:
            self._failed = str(error) or type(error).__name__
            raise
        finally:
            self._writing -= 1
            self._close_unused()

    def _write(self, offset: int, buffer: Buffer) -> None:
        with translated("spool", self._path):
            while len(buffer):
                done = os.pwrite(self._spool.fileno(), buffer, offset)
                offset, buffer = offset + done, buffer[done:]

    async def finish(self, length: int) -> None:
        self._check("length", length)
        check_finish(self._path, length, self._writing, self._failed)
        self._finishing = True
        await on_executor(self._finish, length)
        self._open = False
        self._close_unused()
        self._storage.ended(self._name, length)

    def _finish(self, length: int) -> None:
        with translated("write", self._path):
            os.ftruncate(self._spool.fileno(), length)
            self._spool.seek(0)
            self._check_free()
            self._stored = True  # or a part of it
            self._storage.store(self._name, self._spool)

    def _check_free(self) -> None:
        """Another instance may have stored an object of that name since ``create``: it is not this one's to remove."""
        with suppress(FileNotFoundError):
            self._storage.size_of(self._name)
            raise already_there(self._path)

    async def abort(self) -> None:
        if self._open:
            self._open = False
            self._close_unused()
            try:
                if self._stored:
                    await on_executor(self._remove)
            finally:
                self._storage.ended(self._name, None)

    def _remove(self) -> None:
        with suppress(FileNotFoundError), translated("remove", self._path, FileNotFoundError):
            self._storage.remove(self._name)

    def _check(self, what: str, value: int) -> None:
        check_use(self._path, what, value, is_open=self._open and not self._finishing)

    def _close_unused(self) -> None:
        """Closes the spool after its end, but not below a write: its number may be another file's by then."""
        if not self._open and not self._writing:
            self._spool.close()


class BlockingReader:
    """An ``ObjectReader``."""

    def __init__(self, storage: BlockingStorage, name: str, size: int) -> None:
        self._storage = storage
        self._name = name
        self._path = storage.path_of(name)
        self._size = size
        self._open = True

    @property
    def size(self) -> int:
        return self._size

    @property
    def alignment(self) -> int:
        return 1

    async def read(self, offset: int, buffers: Sequence[Buffer]) -> int:
        self._check(offset)
        await on_thread(self._storage.limiter, self._fill, offset, buffers)
        return max(0, min(sum(map(len, buffers)), self._size - offset))

    async def read_cached(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        self._check(offset)
        return False

    async def fetch(self, *reads: Fetch) -> None:
        for read in reads:
            self._check(read.offset)
        await on_thread(self._storage.limiter, self._carry_out, reads)

    def _carry_out(self, reads: Sequence[Fetch]) -> None:
        for read in reads:
            self._fill(read.offset, read.cached)
            read.then(True)  # noqa: FBT003  # as the port has it

    def _fill(self, offset: int, buffers: Sequence[Buffer]) -> None:
        end = min(offset + sum(map(len, buffers)), self._size)
        if end <= offset:
            return
        with translated("read", self._path, FileNotFoundError):
            data = memoryview(self._storage.read_range(self._name, offset, end))
        if len(data) != end - offset:
            raise EOFError(f"{self._path} gave {len(data)} of {end - offset} bytes at {offset}")
        for buffer in buffers:
            buffer[: len(data)] = data[: len(buffer)]
            data = data[len(buffer) :]

    async def aclose(self) -> None:
        self._open = False

    def _check(self, offset: int) -> None:
        check_use(self._path, "offset", offset, is_open=self._open)


@contextmanager
def translated(operation: str, path: str, *passing: type[OSError]) -> Iterator[None]:
    """What a library raises becomes asyncdcp's, but for ``passing``. An EOFError too: of a connection that was lost."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (AsyncDCPError, *passing)):
            raise
        message = f"cannot {operation} {path}: {str(error) or type(error).__name__}"
        raise storage_error(message, path, getattr(error, "errno", None)) from error
