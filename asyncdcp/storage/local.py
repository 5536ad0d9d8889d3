"""Objects as files of one directory: what has to be synced, in what order, and how a name is won; and a directory that
others wrote, for reading only.

A file's bytes are durable after its own fsync, its name after an fsync of the directory, and the directory after an
fsync of its parent, and so on up to the root of the filesystem. Names of ``put`` and ``claim`` appear at once and
whole: they are written and synced under a temporary name (a leading dot), which is then linked.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import Final, NoReturn

from anyio import CapacityLimiter

from asyncdcp.errors import CommitUnknown, InvalidOption, StorageError, UsageError
from asyncdcp.storage.files import Descriptor, absolute, translated, write_all
from asyncdcp.storage.local_directory import LocalDirectory
from asyncdcp.storage.local_reader import LocalReader
from asyncdcp.storage.local_writer import LocalWriter
from asyncdcp.storage.port import TEMPORARY, StorageInfo, already_there, check_name, check_removable
from asyncdcp.storage.posix import SYSTEM, FileStatus, Posix
from asyncdcp.storage.spec import LocalSpec, StorageSpec
from asyncdcp.threads import on_executor

TRANSFERS: Final = 8
"""How many reads and writes of one LocalStorage are on threads at once."""

_VOLATILE: Final = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})
_NO_RENAME: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS})


class LocalStorage:
    """A ``Storage`` that is one directory, made when the first object is.

    ``direct_io=False`` leaves the page cache in use for everything. ``posix`` stands in for the operating system.

    >>> with asyncdcp.SyncCheckpointer(process=False) as checkpointer:
    ...     _ = checkpointer.save(asyncdcp.LocalStorage("buffered", direct_io=False), {"weight": torch.ones(3)})
    ...     print(checkpointer.load("buffered"))
    {'weight': tensor([1., 1., 1.])}
    """

    def __init__(self, path: str | os.PathLike[str], *, direct_io: bool = True, posix: Posix = SYSTEM) -> None:
        self._path = absolute(path)
        self._direct_io = direct_io
        self._posix = posix
        self._directory = LocalDirectory(self._path, posix)
        self._info: StorageInfo | None = None

    @cached_property
    def _limiter(self) -> CapacityLimiter:
        """Made at its first use: that is on the engine's loop, where the storage itself may be made on trio's."""
        return CapacityLimiter(TRANSFERS)

    @property
    def info(self) -> StorageInfo:
        if self._info is None:
            try:
                kind = self._posix.filesystem(self._path)
            except (OSError, MemoryError):  # no descriptor is left, say; errors must still be able to name the place
                return StorageInfo(self._path, "unknown", volatile=False)
            self._info = StorageInfo(self._path, kind, kind in _VOLATILE)
        return self._info

    def spec(self) -> StorageSpec | None:
        """The same directory for another process; None where ``posix`` is a stand-in, which cannot travel."""
        return LocalSpec(os.fsencode(self._path), self._direct_io) if self._posix is SYSTEM else None

    def is_file(self) -> bool:
        """Whether there is a file where the directory would be. Blocks for a moment."""
        try:
            return stat.S_ISREG(self._posix.stat(self._path).mode)
        except OSError:
            return False

    async def create(self, name: str, length_hint: int) -> LocalWriter:
        path = self._join(name)
        writer = LocalWriter(path, self._posix, self._limiter)
        with translated("create", path, FileExistsError):
            try:
                await on_executor(self._begin, writer, length_hint)
            except BaseException:
                with suppress(StorageError):
                    await writer.abort()
                raise
        return writer

    async def put(self, name: str, data: bytes) -> None:
        path = self._join(name)
        with translated("write", path):
            made = await on_executor(self._publish, path, data)
        if not made:
            raise already_there(path)

    async def claim(self, name: str, data: bytes) -> bool:
        path = self._join(name)
        with translated("claim", path):
            return await on_executor(self._claim, path, data)

    async def barrier(self) -> None:
        with translated("sync", self._path):
            await on_executor(self._directory.sync)

    async def get(self, name: str, limit: int) -> bytes:
        path = self._join(name)
        with translated("read", path, FileNotFoundError):
            return await on_executor(self.load, path, limit)

    async def open(self, name: str) -> LocalReader:
        path = self._join(name)
        reader = LocalReader(path, self._posix, self._limiter)
        with translated("open", path, FileNotFoundError):
            try:
                await on_executor(lambda: reader.begin(direct_io=self._direct_io))
            except BaseException:
                with suppress(StorageError):
                    await reader.aclose()
                raise
        return reader

    async def list(self) -> dict[str, int]:
        return {name: status.size for name, status in (await self._scan()).items() if not name.startswith(".")}

    async def temporaries(self) -> dict[str, str]:
        found = ((name, TEMPORARY.fullmatch(name)) for name in await self._scan())
        return {name: match[1] for name, match in found if match is not None}

    async def _scan(self) -> dict[str, FileStatus]:
        found: dict[str, FileStatus] = {}
        with translated("list", self._path), suppress(FileNotFoundError):
            found = await on_executor(self._posix.scan, self._path)
        return {name: status for name, status in found.items() if stat.S_ISREG(status.mode)}

    async def delete(self, names: Sequence[str]) -> None:
        paths = [os.path.join(self._path, check_removable(name)) for name in names]
        with translated("delete from", self._path):
            await on_executor(self._delete, paths)

    def make(self) -> None:
        """Makes the directory with its ancestors, which the next ``barrier`` makes durable. Blocks; not of the port."""
        self._directory.make()

    def load(self, path: str, limit: int) -> bytes:
        """A whole small file, by its path; as ``get``. Blocks; not of the port."""
        reader = LocalReader(path, self._posix, self._limiter)
        try:
            reader.begin(direct_io=False)
            return reader.load(limit)
        finally:
            reader.close()

    def _join(self, name: str) -> str:
        return os.path.join(self._path, check_name(name))

    # ── on a thread ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, writer: LocalWriter, length_hint: int) -> None:
        self._directory.make()
        writer.begin(length_hint, direct_io=self._direct_io)

    def _delete(self, paths: Sequence[str]) -> None:
        for path in paths:
            with suppress(FileNotFoundError):
                self._posix.unlink(path)

    def _claim(self, path: str, data: bytes) -> bool:
        self._directory.check()
        if not self._publish(path, data):
            return False
        try:
            self._directory.sync()
        except Exception as error:
            message = f"{path} was claimed, and whether that is durable is not known: {error!r}"
            raise CommitUnknown(message, path=path, errno=getattr(error, "errno", None)) from error
        return True

    def _publish(self, path: str, data: bytes) -> bool:
        """Makes a small file appear whole under its name, its bytes durable; False if there is a file of that name.

        The temporary is gone afterwards in every case. Only if the outcome is open *and* it cannot be removed (so
        that a request still under way might yet be carried out) that is ``CommitUnknown``; a leftover temporary alone
        harms nobody.
        """
        self._directory.make()
        directory, name = os.path.split(path)
        temporary = os.path.join(directory, f".{name}.{secrets.token_hex(8)}")
        try:
            self._write_small(temporary, data)
            return self._link(temporary, path)
        finally:
            with suppress(OSError):
                self._posix.unlink(temporary)

    def _write_small(self, path: str, data: bytes) -> None:
        file = Descriptor(self._posix, path)
        fd = file.open(os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        try:
            write_all(self._posix, fd, data)
            self._posix.fsync(fd)
        finally:
            file.close()

    def _link(self, temporary: str, path: str) -> bool:
        """Gives the file its name. The number of links is what counts, not the answer.

        NFS can lose the answer to a link that was made, and its second try then fails with any error, EEXIST too.
        """
        try:
            self._posix.link(temporary, path)
        except OSError as error:
            if self._links(temporary, path, error) > 1:
                return True
            if error.errno == errno.EEXIST:
                return False
            if error.errno not in _NO_LINKS:
                self._withdraw(temporary, path, error)
                raise
            return self._rename(temporary, path)
        return True

    def _rename(self, temporary: str, path: str) -> bool:
        """The way for filesystems without hard links. A file that went from one name to the other is what counts."""
        inode = self._posix.stat(temporary).inode
        try:
            self._posix.rename_noreplace(temporary, path)
        except OSError as error:
            if self._links(temporary, path, error) == 0:
                return self._moved(path, inode, error)
            if error.errno == errno.EEXIST:
                return False
            if error.errno in _NO_RENAME:
                message = (
                    f"cannot create {path} exclusively: the filesystem has neither hard links nor RENAME_NOREPLACE"
                )
                raise StorageError(message, path=path, errno=error.errno) from error
            self._withdraw(temporary, path, error)
            raise
        return True

    def _moved(self, path: str, inode: int, error: OSError) -> bool:
        with suppress(OSError):
            if self._posix.stat(path).inode == inode:
                return True
        message = f"whether {path} was claimed cannot be told, since its temporary is gone: {error}"
        raise CommitUnknown(message, path=path, errno=error.errno) from error

    def _links(self, temporary: str, path: str, error: OSError) -> int:
        try:
            return self._posix.stat(temporary).links
        except FileNotFoundError:
            return 0
        except OSError as unknown:
            message = f"whether {path} was claimed cannot be told ({error}): {unknown}"
            raise CommitUnknown(message, path=path, errno=unknown.errno) from error

    def _withdraw(self, temporary: str, path: str, error: OSError) -> None:
        """Removes what a request that failed for no clear reason could still be carried out upon."""
        try:
            self._posix.unlink(temporary)
        except OSError as unknown:
            message = f"whether {path} will be claimed cannot be told ({error}): {unknown}"
            raise CommitUnknown(message, path=path, errno=unknown.errno) from error


class ForeignDirectory(LocalStorage):
    """A directory for reading, whose files may have any name, a leading dot too; nothing in it is ever changed."""

    async def list(self) -> dict[str, int]:
        """Every regular file, hidden ones too."""
        return {name: status.size for name, status in (await self._scan()).items()}

    def _join(self, name: str) -> str:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise InvalidOption(f"not a file's name: {name!r:.200}")
        return os.path.join(self._path, name)

    async def create(self, name: str, length_hint: int) -> NoReturn:
        raise self._refusal()

    async def put(self, name: str, data: bytes) -> NoReturn:
        raise self._refusal()

    async def claim(self, name: str, data: bytes) -> NoReturn:
        raise self._refusal()

    async def delete(self, names: object) -> NoReturn:
        raise self._refusal()

    def _refusal(self) -> UsageError:
        return UsageError(f"{self._path} is open for reading only", path=self._path)
