"""The folder of a DCP checkpoint, from what the caller gave."""

from __future__ import annotations

import os
from pathlib import Path

from asyncdcp.errors import InvalidOption


def folder_of(given: str | os.PathLike[str]) -> Path:
    """As a path; ``InvalidOption`` for a URL, of which a folder with such a name would be made here."""
    if "://" in os.fspath(given):
        raise InvalidOption(
            f"path is {given!r}; DCP's writer and reader take a folder of this machine. "
            "AsyncCheckpointer and CheckpointManager take URLs"
        )
    return Path(given)
