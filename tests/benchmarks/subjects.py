"""The ways to save and load that are measured, and the raw limits."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from asyncdcp import AsyncCheckpointer
from asyncdcp.arena import Arena
from asyncdcp.format.blocks import SLAB_BYTES
from asyncdcp.pipeline.reader import READS_IN_FLIGHT
from asyncdcp.pipeline.writer import WRITES_IN_FLIGHT
from asyncdcp.staging.stager import COPIES_IN_FLIGHT
from asyncdcp.storage.posix import PAGE, SYSTEM
from tests.benchmarks.states import tensors_of

Seconds = dict[str, float]


class Subject(Protocol):
    """A way to save ``source`` into a folder, and to load it from there into ``target``."""

    name: str

    def save(self, folder: Path) -> Seconds:
        """Returns what is known of "call", "stall" and "durable"."""
        ...

    def load(self, folder: Path, *, warm: bool) -> None:
        """Fills the target in place. ``warm`` says whether the page cache has the files."""
        ...

    def close(self) -> None:
        """Gives memory and threads back."""
        ...


class AsyncDCP:
    """The subject of the matter."""

    name = "asyncdcp"

    def __init__(self, source: Any, target: Any, *, process: bool) -> None:
        self._source, self._target = source, target
        self._checkpointer = AsyncCheckpointer(process=process)
        self._checkpointer.prepare(source).result()

    def save(self, folder: Path) -> Seconds:
        begun = time.perf_counter()
        handle = self._checkpointer.save(folder, self._source)
        called = time.perf_counter()
        handle.staged.result()
        staged = time.perf_counter()
        handle.result()
        return {"call": called - begun, "stall": staged - begun, "durable": time.perf_counter() - begun}

    def load(self, folder: Path, *, warm: bool) -> None:
        self._checkpointer.load(folder, self._target).result()

    def close(self) -> None:
        self._checkpointer.close()


class TorchSave:
    """``torch.save`` and ``torch.load``, mapped, so that every byte is copied once, into the target."""

    name = "torch.save + fsync"

    def __init__(self, source: Any, target: Any) -> None:
        self._source, self._targets = source, tensors_of(target)

    def save(self, folder: Path) -> Seconds:
        begun = time.perf_counter()
        folder.mkdir()
        with open(folder / "state.pt", "wb") as file:
            torch.save(self._source, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(folder)
        return _blocking(time.perf_counter() - begun)

    def load(self, folder: Path, *, warm: bool) -> None:
        loaded = tensors_of(torch.load(folder / "state.pt", mmap=True, weights_only=True))
        for name, target in self._targets.items():
            target.copy_(loaded[name])

    def close(self) -> None:
        pass


class SafeTensors:
    """The safetensors library; it stores tensors only, and maps the file to load."""

    name = "safetensors + fsync"

    def __init__(self, source: Any, target: Any) -> None:
        self._sources, self._targets = tensors_of(source), tensors_of(target)

    def save(self, folder: Path) -> Seconds:
        begun = time.perf_counter()
        folder.mkdir()
        path = folder / "state.safetensors"
        safetensors.torch.save_file(self._sources, path)
        _sync(path)
        _sync_folder(folder)
        return _blocking(time.perf_counter() - begun)

    def load(self, folder: Path, *, warm: bool) -> None:
        with safetensors.safe_open(folder / "state.safetensors", framework="pt") as file:
            for name, target in self._targets.items():
                target.copy_(file.get_tensor(name))

    def close(self) -> None:
        pass


class Raw:
    """What the machine can do at most: its "stall" is the memcpy alone, its "durable" the write and fsync alone."""

    name = "raw limits"

    def __init__(self, source: Any) -> None:
        tensors = tensors_of(source)
        self._size = sum(tensor.nbytes for tensor in tensors.values())
        self._slabs = range(-(-self._size // SLAB_BYTES))
        self._arena = Arena(len(self._slabs), SLAB_BYTES)
        self._arena.prefault()
        self._pieces = list(_pieces(list(tensors.values()), self._arena.address))
        self._tensors = tensors  # keeps the addresses alive
        self._executor = ThreadPoolExecutor(max(COPIES_IN_FLIGHT, WRITES_IN_FLIGHT, READS_IN_FLIGHT))

    def save(self, folder: Path) -> Seconds:
        folder.mkdir()
        begun = time.perf_counter()
        self._run(COPIES_IN_FLIGHT, lambda piece: ctypes.memmove(*piece), self._pieces)
        copied = time.perf_counter()
        with opened(folder / "raw", os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_DIRECT) as fd:
            SYSTEM.fallocate(fd, self._size)
            self._run(WRITES_IN_FLIGHT, lambda slab: self._write(fd, slab), self._slabs)
            os.ftruncate(fd, self._size)
            os.fsync(fd)
        _sync_folder(folder)
        return {"stall": copied - begun, "durable": time.perf_counter() - copied}

    def load(self, folder: Path, *, warm: bool) -> None:
        with opened(folder / "raw", os.O_RDONLY | (0 if warm else os.O_DIRECT)) as fd:
            self._run(READS_IN_FLIGHT, lambda slab: self._read(fd, slab), self._slabs)

    def close(self) -> None:
        self._executor.shutdown()
        self._arena.close()

    def _run(self, threads: int, function: Callable[[Any], object], items: Sequence[Any]) -> None:
        """``function`` of all items, on so many threads."""
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


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _sync(path: Path) -> None:
    with opened(path, os.O_RDONLY) as fd:
        os.fsync(fd)


def _sync_folder(folder: Path) -> None:
    """Makes the names in a new folder, and its own, as durable as asyncdcp does."""
    _sync(folder)
    _sync(folder.parent)


def _blocking(seconds: float) -> Seconds:
    """A save that keeps its caller until it is durable."""
    return {"call": seconds, "stall": seconds, "durable": seconds}
