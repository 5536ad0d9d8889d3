"""Files that a command writes: there whole, or as they were before."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

import click


@contextmanager
def written_whole(path: str) -> Iterator[BinaryIO]:
    """A file to write to, which becomes ``path`` where the block ends well, and is gone where it does not.

    A link stays, and what it leads to is replaced. A pipe or a device, such as /dev/stdout, is written to as it is: a
    rename would put a file in its place.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as special:
            yield special
        return
    if os.path.islink(path):
        path = os.path.realpath(path)
    folder = os.path.dirname(path)
    if folder and not os.path.isdir(folder):
        raise click.ClickException(f"{path} cannot be written: there is no folder {folder}")
    partial = f"{path}.{secrets.token_hex(4)}.partial"
    try:
        with open(partial, "xb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise
