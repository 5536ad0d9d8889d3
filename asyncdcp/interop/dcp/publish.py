"""The one moment in which a DCP checkpoint comes into being: its ``.metadata`` gets its name."""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from asyncdcp.errors import CorruptCheckpoint
from asyncdcp.interop.dcp.metadata_pickle import load_metadata
from asyncdcp.storage.files import sync_directory, translated

_METADATA = re.compile(r"(__\d+)?\.metadata")
_DATA = re.compile(r"__\d+_.*\.distcp")

_logger = logging.getLogger("asyncdcp")


def publish(path: Path, data: bytes, *, sync: bool) -> None:
    """Puts ``data`` in the place of ``path`` at once and whole, durable if ``sync``; ``StorageError`` otherwise.

    A crash leaves what was there before, or the new file.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with translated("write", os.fspath(path)):
        made = _make(path.parent)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        if sync:
            for directory in (path.parent, *made):
                sync_directory(directory)


def remove_unnamed(published: Path, prefix: str, named: set[str]) -> None:
    """Removes data files with ``prefix`` that are neither in ``named``, those of the metadata just ``published``, nor
    in other metadata beside it: they are of a checkpoint that was overwritten, or of a save that came to nothing. Where
    that cannot be told, nothing is removed.
    """
    directory = published.parent
    try:
        left = [path for path in _files(directory, _DATA) if path.name.startswith(prefix) and path.name not in named]
        others = [path for path in _files(directory, _METADATA) if path != published] if left else []
        kept = {name for path in others for name in _named(path)}
        for path in left:
            if path.name not in kept:
                path.unlink(missing_ok=True)
    except (OSError, CorruptCheckpoint) as error:
        _logger.warning("files of an earlier checkpoint in %s could not be removed: %s", directory, error)


def _named(path: Path) -> set[str]:
    places = load_metadata(path.read_bytes(), os.fspath(path)).storage_data
    return {info.relative_path for info in places.values()}


def _files(directory: Path, pattern: re.Pattern[str]) -> Iterator[Path]:
    return (path for path in directory.iterdir() if pattern.fullmatch(path.name))


def _make(directory: Path) -> list[Path]:
    """Makes a directory; the parents of all that were made."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return [path.parent for path in missing]
