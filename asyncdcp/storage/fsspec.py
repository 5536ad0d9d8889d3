"""Whatever fsspec reaches and obstore does not (hf://, sftp://, …): slower than either, and with one promise less.

What is written is spooled to a local temporary file and sent when it is whole; reads and writes block a thread each.
And fsspec has no way to create a name exclusively, which is how a commit is won. So such a storage only saves where you
say that nobody else does (``single_writer=True``): then claims are exclusive within this process. It never travels to
the background process: saves to it run on a thread.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import IO, Any, Final, TypeVar

from anyio import CapacityLimiter

from asyncdcp.errors import (
    AsyncDCPError,
    CorruptCheckpoint,
    InvalidOption,
    MissingDependency,
    StorageError,
    UsageError,
    storage_error,
)
from asyncdcp.storage.port import NAME_PATTERN, Buffer, Fetch, StorageInfo, check_name, check_use
from asyncdcp.threads import on_executor, on_thread

T = TypeVar("T")

_TRANSFERS: Final = 4
_TEMPORARY: Final = re.compile(rf"\.{NAME_PATTERN}\.[0-9a-f]{{16}}")
_WHOLE: Final = ("memory", "hf")
"""Protocols where a file appears whole; with others it gets its name by a rename."""
_claiming: Final = threading.Lock()  # one for the process, which is as far as exclusiveness reaches


class FsspecStorage:
    """A ``Storage`` at a URL of fsspec's; ``options`` go to its filesystem.

    Without ``single_writer=True`` it only reads. ``MissingDependency`` where fsspec, or what the protocol needs, is not
    installed; ``InvalidOption`` for a protocol that it does not know.
    """

    def __init__(self, url: str, *, single_writer: bool = False, options: Mapping[str, Any] | None = None) -> None:
        try:
            from fsspec.core import url_to_fs

            self._fs, path = url_to_fs(url, use_listings_cache=False, **(options or {}))
        except ImportError as error:
            raise MissingDependency(f"{url} needs a package that is not installed: {error}") from error
        except ValueError as error:
            raise InvalidOption(f"target is {url!r}: {error}") from error
        self._path = str(path).rstrip("/")
        protocol = self._fs.protocol
        self._protocol = protocol if isinstance(protocol, str) else protocol[0]
        self._single_writer = single_writer
        self._writing: set[str] = set()
        self._unseen: dict[str, int] = {}
        self.info = StorageInfo(url.rstrip("/"), self._protocol, volatile=self._protocol == "memory")

    @cached_property
    def _limiter(self) -> CapacityLimiter:
        return CapacityLimiter(_TRANSFERS)

    async def create(self, name: str, length_hint: int) -> FsspecWriter:
        path = self._join(name)
        self._check_single()
        if name in self._writing or await self._run("create", name, self._fs.exists, path):
            raise _exists(path)
        self._writing.add(name)
        return FsspecWriter(path, self._limiter, lambda spool: self._send(name, spool), lambda: self._ended(name))

    def _ended(self, name: str) -> None:
        self._writing.discard(name)

    async def put(self, name: str, data: bytes) -> None:
        if not await self.claim(name, data):
            raise _exists(self._join(name))

    async def claim(self, name: str, data: bytes) -> bool:
        path = self._join(name)
        self._check_single()
        won = await self._run("claim", name, self._claim, path, data)
        if won:
            self._unseen[name] = len(data)
        return won

    async def barrier(self) -> None:
        """Looks whether what was stored is there, as long as it was."""
        for name, size in list(self._unseen.items()):
            found = await self._run("verify", name, self._fs.info, self._join(name))
            if found["size"] != size:
                message = f"{self._join(name)} has {found['size']} bytes, and {size} were stored"
                raise StorageError(message, path=self._join(name))
            self._unseen.pop(name, None)

    async def get(self, name: str, limit: int) -> bytes:
        reader = await self.open(name)
        if reader.size > limit:
            message = f"{self._join(name)} has {reader.size} bytes, more than the {limit} that it may have"
            raise CorruptCheckpoint(message, path=self._join(name))
        data = bytearray(reader.size)
        await reader.read(0, [memoryview(data)])
        return bytes(data)

    async def open(self, name: str) -> FsspecReader:
        path = self._join(name)
        found = await self._run("open", name, self._fs.info, path)

        def read(begin: int, end: int) -> bytes:
            with _translated("read", path):
                data: bytes = self._fs.cat_file(path, start=begin, end=end)
                return data

        return FsspecReader(path, int(found["size"]), read, self._limiter)

    async def list(self) -> dict[str, int]:
        found = await self._entries()
        return {name: size for name, size in found.items() if not name.startswith(".")}

    async def temporaries(self) -> dict[str, str]:
        found = await self._entries()
        return {name: name[1:].rpartition(".")[0] for name in found if name.startswith(".")}

    async def delete(self, names: Sequence[str]) -> None:
        for name in names:
            if not _TEMPORARY.fullmatch(name):
                check_name(name)
        for name in names:
            self._unseen.pop(name, None)
            with suppress(FileNotFoundError):
                await self._run("delete", name, self._fs.rm_file, f"{self._path}/{name}")

    def _join(self, name: str) -> str:
        return f"{self._path}/{check_name(name)}"

    def _check_single(self) -> None:
        if not self._single_writer:
            raise UsageError(
                f"{self.info.location}: fsspec cannot create a name exclusively, so two jobs that save here would not "
                "see each other; if nobody else saves here, pass FsspecStorage(url, single_writer=True)"
            )

    async def _run(self, operation: str, name: str, function: Callable[..., T], *args: Any) -> T:
        path = f"{self._path}/{name}"

        def call() -> T:
            with _translated(operation, path):
                return function(*args)

        return await on_executor(call)

    async def _entries(self) -> dict[str, int]:
        def entries() -> dict[str, int]:
            self._fs.invalidate_cache(self._path)
            found = self._fs.ls(self._path, detail=True)
            return {each["name"].rpartition("/")[2]: int(each["size"]) for each in found if each["type"] == "file"}

        try:
            return await self._run("list", "", entries)
        except FileNotFoundError:
            return {}

    # ── on a thread ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _claim(self, path: str, data: bytes) -> bool:
        with _claiming:
            if self._fs.exists(path):
                return False
            self._fs.makedirs(self._path, exist_ok=True)
            if self._protocol in _WHOLE:
                self._fs.pipe_file(path, data)
            else:
                directory, _, name = path.rpartition("/")
                temporary = f"{directory}/.{name}.{secrets.token_hex(8)}"
                self._fs.pipe_file(temporary, data)
                self._fs.mv(temporary, path)
            return True

    def _send(self, name: str, spool: IO[bytes]) -> None:
        path = f"{self._path}/{name}"
        with _translated("write", path):
            self._fs.makedirs(self._path, exist_ok=True)
            with self._fs.open(path, "wb") as file:
                shutil.copyfileobj(spool, file, 1 << 20)
        self._unseen[name] = spool.tell()


class FsspecWriter:
    """An ``ObjectWriter``: a local temporary file until ``finish``."""

    def __init__(
        self, path: str, limiter: CapacityLimiter, send: Callable[[IO[bytes]], None], on_end: Callable[[], None]
    ) -> None:
        self._path = path
        self._limiter = limiter
        self._send = send
        self._on_end = on_end
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115  # closed by finish or abort
        self._failed = False

    @property
    def alignment(self) -> int:
        return 1

    async def write(self, offset: int, buffer: Buffer) -> None:
        self._check("offset", offset)
        try:
            await on_thread(self._limiter, self._write, offset, buffer)
        except BaseException:
            self._failed = True
            raise

    def _write(self, offset: int, buffer: Buffer) -> None:
        with _translated("spool", self._path):
            while len(buffer):
                done = os.pwrite(self._spool.fileno(), buffer, offset)
                offset, buffer = offset + done, buffer[done:]

    async def finish(self, length: int) -> None:
        self._check("length", length)
        if self._failed:
            raise StorageError(f"cannot finish {self._path}: a write of it failed", path=self._path)
        self._failed = True  # unless it comes to its end
        await on_executor(self._finish, length)
        self._spool.close()
        self._on_end()

    def _finish(self, length: int) -> None:
        os.ftruncate(self._spool.fileno(), length)
        self._spool.seek(0)
        self._send(self._spool)

    async def abort(self) -> None:
        if not self._spool.closed:
            self._spool.close()
            self._on_end()

    def _check(self, what: str, value: int) -> None:
        check_use(self._path, what, value, is_open=not self._spool.closed)


class FsspecReader:
    """An ``ObjectReader``; ``read_bytes`` gets a range, and blocks."""

    def __init__(self, path: str, size: int, read_bytes: Callable[[int, int], bytes], limiter: CapacityLimiter) -> None:
        self._path = path
        self._size = size
        self._read_bytes = read_bytes
        self._limiter = limiter
        self._open = True

    @property
    def size(self) -> int:
        return self._size

    @property
    def alignment(self) -> int:
        return 1

    async def read(self, offset: int, buffers: Sequence[Buffer]) -> int:
        self._check(offset)
        await on_thread(self._limiter, self._fill, offset, buffers)
        return max(0, min(sum(map(len, buffers)), self._size - offset))

    async def read_cached(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        self._check(offset)
        return False

    async def fetch(self, *reads: Fetch) -> None:
        for read in reads:
            self._check(read.offset)
        await on_thread(self._limiter, self._carry_out, reads)

    def _carry_out(self, reads: Sequence[Fetch]) -> None:
        for read in reads:
            self._fill(read.offset, read.cached)
            read.then(True)  # noqa: FBT003  # as the port has it

    def _fill(self, offset: int, buffers: Sequence[Buffer]) -> None:
        end = min(offset + sum(map(len, buffers)), self._size)
        data = memoryview(self._read_bytes(offset, end) if end > offset else b"")
        if len(data) < end - offset:
            raise EOFError(f"{self._path} gave {len(data)} of {end - offset} bytes at {offset}")
        for buffer in buffers:
            buffer[: len(data)] = data[: len(buffer)]
            data = data[len(buffer) :]

    async def aclose(self) -> None:
        self._open = False

    def _check(self, offset: int) -> None:
        check_use(self._path, "offset", offset, is_open=self._open)


@contextmanager
def _translated(operation: str, path: str) -> Iterator[None]:
    """Filesystems of fsspec raise whatever the library below them does."""
    try:
        yield
    except (AsyncDCPError, FileNotFoundError, EOFError):
        raise
    except Exception as error:
        message = f"cannot {operation} {path}: {error or type(error).__name__}"
        raise storage_error(message, path, getattr(error, "errno", None)) from error


def _exists(path: str) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
