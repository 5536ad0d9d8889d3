"""What a way to save and load is to the benchmarks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol


class Peer(Protocol):
    """Saves ``source`` into a folder, and loads it from there into ``target``. One save at a time.

    ``begin`` returns as soon as the caller may go on and *read* the tensors, ``staged`` when it may change them,
    ``finish`` when the save is durable: where a peer does not sync its files, that is done here, as a user who wants to
    keep them would. ``done`` says without waiting whether there is nothing left but that.
    """

    key: ClassVar[str]
    """What it is called on the command line."""
    name: ClassVar[str]
    """What it is called in a table."""
    needs: ClassVar[str]
    """The package that has to be installed."""
    runs_a_loop: ClassVar[bool]
    """Whether ``begin`` runs an event loop of its own, so that it cannot be called on one."""

    def __init__(self, source: Any, target: Any) -> None: ...

    def begin(self, folder: Path) -> None: ...

    def staged(self) -> None: ...

    def done(self) -> bool: ...

    def finish(self) -> None: ...

    def load(self, folder: Path) -> None:
        """Fills the target in place."""
        ...

    def close(self) -> None:
        """Gives memory, threads and processes back."""
        ...


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A descriptor, closed afterwards."""
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def sync(folder: Path) -> None:
    """Makes a new folder durable: its files, their names, and its own."""
    for path in [*(path for path in folder.rglob("*")), folder, folder.parent]:
        with opened(path, os.O_RDONLY) as fd:
            os.fsync(fd)
