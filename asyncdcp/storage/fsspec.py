"""Whatever fsspec reaches and obstore does not (hf://, sftp://, …): slower than either, and with one promise less.

fsspec has no way to create a name exclusively, which is how a commit is won. So such a storage only saves where you
say that nobody else does (``single_writer=True``): then claims are exclusive within this process.
"""

from __future__ import annotations

import re
import secrets
import shutil
import threading
from collections.abc import Mapping
from typing import IO, Any, Final

from asyncdcp.errors import InvalidOption, MissingDependency, UsageError
from asyncdcp.storage.blocking import BlockingStorage, BlockingWriter
from asyncdcp.storage.port import StorageInfo, check_name

_WHOLE: Final = ("memory", "hf")
"""Protocols where a file appears whole; with others it gets its name by a rename."""
_PASSWORD: Final = re.compile(r"(://[^/@:]*):[^/@]*@")
_claiming: Final = threading.Lock()  # one for the process, which is as far as exclusiveness reaches


class FsspecStorage(BlockingStorage):
    """A ``Storage`` at a URL of fsspec's; ``options`` go to its filesystem. A password in the URL is not shown.

    Without ``single_writer=True`` it only reads. ``MissingDependency`` where fsspec, or what the protocol needs, is not
    installed; ``InvalidOption`` for a protocol that it does not know.
    """

    def __init__(self, url: str, *, single_writer: bool = False, options: Mapping[str, Any] | None = None) -> None:
        try:
            from fsspec.core import url_to_fs

            self._fs, path = url_to_fs(url, use_listings_cache=False, **(options or {}))
        except ImportError as error:
            raise MissingDependency(f"{_shown(url)} needs a package that is not installed: {error}") from error
        except ValueError as error:
            raise InvalidOption(f"target is {_shown(url)!r}: {error}") from error
        self._path = str(path).rstrip("/")
        protocol = self._fs.protocol
        self._protocol = protocol if isinstance(protocol, str) else protocol[0]
        self._single_writer = single_writer
        super().__init__(StorageInfo(_shown(url).rstrip("/"), self._protocol, volatile=self._protocol == "memory"))

    async def create(self, name: str, length_hint: int) -> BlockingWriter:
        self._check_single(name)
        return await super().create(name, length_hint)

    async def claim(self, name: str, data: bytes) -> bool:
        self._check_single(name)
        return await super().claim(name, data)

    def _check_single(self, name: str) -> None:
        check_name(name)
        if not self._single_writer:
            raise UsageError(
                f"{self.info.location}: fsspec cannot create a name exclusively, so two jobs that save here would not "
                "see each other; if nobody else saves here, pass FsspecStorage(url, single_writer=True)"
            )

    # ── on a thread ─────────────────────────────────────────────────────────────────────────────────────────────────

    def sizes(self) -> dict[str, int]:
        self._fs.invalidate_cache(self._path)
        try:
            found = self._fs.ls(self._path, detail=True)
        except FileNotFoundError:
            return {}
        return {each["name"].rpartition("/")[2]: int(each["size"]) for each in found if each["type"] == "file"}

    def size_of(self, name: str) -> int:
        return int(self._fs.info(self._at(name))["size"])

    def read_range(self, name: str, begin: int, end: int) -> bytes:
        data: bytes = self._fs.cat_file(self._at(name), start=begin, end=end)
        return data

    def store(self, name: str, file: IO[bytes]) -> None:
        self._fs.makedirs(self._path, exist_ok=True)
        with self._fs.open(self._at(name), "wb") as target:
            shutil.copyfileobj(file, target, 1 << 20)

    def store_new(self, name: str, data: bytes) -> bool:
        with _claiming:
            if self._fs.exists(self._at(name)):
                return False
            self._fs.makedirs(self._path, exist_ok=True)
            if self._protocol in _WHOLE:
                self._fs.pipe_file(self._at(name), data)
            else:
                temporary = self._at(f".{name}.{secrets.token_hex(8)}")
                self._fs.pipe_file(temporary, data)
                self._fs.mv(temporary, self._at(name))
            return True

    def remove(self, name: str) -> None:
        self._fs.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"


def _shown(url: str) -> str:
    """The URL for people: where a storage is stands in logs and errors."""
    return _PASSWORD.sub(r"\1:***@", url)
