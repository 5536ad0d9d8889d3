"""What the machine can do at most: copies and I/O of the same bytes that make no checkpoint.

They use asyncdcp's slab size and as many threads: memcpy into an arena that is in memory already, O_DIRECT write and
fsync from there, O_DIRECT read, and a read of what is in the page cache.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from asyncdcp.arena import Arena
from asyncdcp.format.blocks import SLAB_BYTES
from asyncdcp.pipeline.reader import READS_IN_FLIGHT
from asyncdcp.pipeline.writer import WRITES_IN_FLIGHT
from asyncdcp.staging.stager import COPIES_IN_FLIGHT
from asyncdcp.storage.posix import PAGE, SYSTEM
from tests.benchmarks.peers.peer import opened
from tests.benchmarks.states import tensors_of


class Limits:
    """Over the tensors of ``source``. Takes as much memory again."""

    name: Final = "the machine's limits"

    def __init__(self, source: Any) -> None:
        tensors = tensors_of(source)
        self._size = sum(tensor.nbytes for tensor in tensors.values())
        self._slabs = range(-(-self._size // SLAB_BYTES))
        self._arena = Arena(len(self._slabs), SLAB_BYTES)
        self._arena.prefault()
        self._pieces = list(_pieces(list(tensors.values()), self._arena.address))
        self._tensors = tensors  # keeps the addresses alive
        self._executor = ThreadPoolExecutor(max(COPIES_IN_FLIGHT, WRITES_IN_FLIGHT, READS_IN_FLIGHT))

    def copy(self) -> None:
        """All tensors into the warm arena."""
        self._run(COPIES_IN_FLIGHT, lambda piece: ctypes.memmove(*piece), self._pieces)

    def write(self, folder: Path) -> None:
        """The arena to a new file: O_DIRECT, then fsync of it and its folder."""
        folder.mkdir()
        with opened(folder / "raw", os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_DIRECT) as fd:
            SYSTEM.fallocate(fd, self._size)
            self._run(WRITES_IN_FLIGHT, lambda slab: self._write(fd, slab), self._slabs)
            os.ftruncate(fd, self._size)
            os.fsync(fd)
        for path in (folder, folder.parent):
            with opened(path, os.O_RDONLY) as fd:
                os.fsync(fd)

    def read(self, folder: Path, *, direct: bool) -> None:
        """The file into the arena."""
        with opened(folder / "raw", os.O_RDONLY | (os.O_DIRECT if direct else 0)) as fd:
            self._run(READS_IN_FLIGHT, lambda slab: self._read(fd, slab), self._slabs)

    def close(self) -> None:
        """Gives the memory back."""
        self._executor.shutdown()
        self._arena.close()

    def _run(self, threads: int, function: Callable[[Any], object], items: Sequence[Any]) -> None:
        iterator = iter(items)

        def work() -> None:
            for item in iterator:  # the iterators of lists and ranges may be shared by threads
                function(item)

        for future in [self._executor.submit(work) for _ in range(threads)]:
            future.result()

    def _write(self, fd: int, slab: int) -> None:
        length = min(SLAB_BYTES, -(-(self._size - slab * SLAB_BYTES) // PAGE) * PAGE)
        if os.pwrite(fd, self._arena.slot(slab)[:length], slab * SLAB_BYTES) != length:
            raise OSError("a short write")

    def _read(self, fd: int, slab: int) -> None:
        length = min(SLAB_BYTES, self._size - slab * SLAB_BYTES)
        if os.preadv(fd, [self._arena.slot(slab)], slab * SLAB_BYTES) != length:
            raise OSError("a short read")


def _pieces(tensors: Sequence[Tensor], address: int) -> Iterator[tuple[int, int, int]]:
    """The tensors packed one after another, cut at slab borders: to, from, length."""
    offset = 0
    for tensor in tensors:
        done = 0
        while done < tensor.nbytes:
            length = min(tensor.nbytes - done, SLAB_BYTES - offset % SLAB_BYTES)
            yield address + offset, tensor.data_ptr() + done, length
            offset, done = offset + length, done + length
