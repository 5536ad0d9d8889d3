"""``.pt`` files: one that ``torch.save`` wrote, read as a checkpoint; and one written from another checkpoint.

A file is mapped, so that only what a load wants is read. Its pickle is loaded with ``weights_only=True``, which makes
nothing but tensors and plain containers; anything else in it is refused. One is written without its tensors' bytes
first, then mapped, and filled in place.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import torch
from anyio import to_thread
from torch import Tensor

from asyncdcp.boxes import whole
from asyncdcp.errors import CorruptCheckpoint, UnsupportedFormat
from asyncdcp.interop.selection import Selection
from asyncdcp.interop.streaming import Digests, known_dtype, read_ahead, whole_tensor
from asyncdcp.interop.targets import ReadBack, replacing
from asyncdcp.metadata import (
    BytesStorageMetadata,
    ChunkLocation,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from asyncdcp.pipeline.formats import ForeignPlace, ReadableCheckpoint
from asyncdcp.pipeline.windows import ReadRange
from asyncdcp.state_dict.flatten import FlatState, flatten
from asyncdcp.state_dict.structure import DTYPE_NAMES
from asyncdcp.state_dict.tensors import memory
from asyncdcp.state_dict.unflatten import unflatten
from asyncdcp.storage import LocalStorage
from asyncdcp.storage.files import translated
from asyncdcp.threads import uncut
from asyncdcp.trace import Trace

_ZIP: Final = b"PK\x03\x04"
_LEGACY: Final = pickle.dumps(0x1950A86A20F9469CFC6C, 2)[2:]
"""How torch.save's files began before torch 1.6, behind the few bytes with the protocol of the pickle."""
_STYLES: Final = re.compile(r"\x1b\[[0-9;]*m")


class TorchFileCheckpoint:
    """A ``ReadableCheckpoint`` over a mapped file. The format has checksums that torch does not look at; nor is it done
    here.
    """

    def __init__(self, path: str, flat: FlatState) -> None:
        self._tensors = flat.tensors
        described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        places: dict[MetadataIndex, ChunkLocation] = {}
        for name, tensor in flat.tensors.items():
            box = whole(tuple(tensor.shape))
            chunk = ChunkStorageMetadata(box.offsets, box.sizes)
            properties = TensorProperties(DTYPE_NAMES[tensor.dtype])
            described[name] = TensorStorageMetadata(properties, box.sizes, (chunk,))
            places[MetadataIndex(name, box.offsets)] = ChunkLocation(name, 0, tensor.nbytes)
        values = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in flat.values.items()}
        described |= {name: BytesStorageMetadata(len(bytes(value))) for name, value in values.items()}
        meta = StorageMeta(path, "torch.save", 1, os.stat(path).st_mtime, {})
        tree = msgspec.Raw(msgspec.json.encode(flat.tree))
        self.metadata = Metadata(described, places, meta, flat.aliases, tree, values)

    async def read(self, ranges: Sequence[ReadRange], trace: Trace) -> None:
        """Copies from the mapping, on a thread."""
        await to_thread.run_sync(self._read, ranges, trace)

    def _read(self, ranges: Sequence[ReadRange], trace: Trace) -> None:
        for part in ranges:
            with trace.span("read", part.end - part.begin):
                data = memory(self._tensors[part.file])[part.begin : part.end]
                if part.into is not None:
                    ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(part.into)), _address(data), len(data))
                elif part.deliver is not None:
                    part.deliver(0, data)

    async def aclose(self) -> None:
        """The mapping goes with the last tensor."""
        self._tensors = {}


async def open_torch_file(place: ForeignPlace) -> TorchFileCheckpoint | None:
    """What ``torch.save`` wrote to the file that the caller named; None if it is something else."""
    if place.name is None or not isinstance(place.storage, LocalStorage):
        return None
    path = os.path.join(place.storage.info.location, place.name)
    return await to_thread.run_sync(_open, path)


def _open(path: str) -> TorchFileCheckpoint | None:
    with open(path, "rb") as file:
        start = file.read(32)
    if _LEGACY in start:
        raise UnsupportedFormat(
            f"{path} is a file as torch.save wrote it before torch 1.6, which cannot be mapped; write it anew: "
            "torch.save(torch.load(old, weights_only=True), new)",
            path=path,
        )
    if not start.startswith(_ZIP):
        return None
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsupportedFormat(
            f"{path} holds more than tensors and plain containers, which is not unpickled; load it with torch where "
            f"you trust it, and save its state dicts ({_first_line(error)})",
            path=path,
        ) from error
    except (RuntimeError, ValueError, KeyError, EOFError, OSError) as error:
        raise CorruptCheckpoint(
            f"{path} is no file of torch.save, or not a whole one ({_first_line(error)})", path=path
        ) from error
    if isinstance(state, Tensor) or not isinstance(state, dict):
        raise UnsupportedFormat(f"{path} holds a {type(state).__name__}, not a dict", path=path)
    return TorchFileCheckpoint(path, flatten(state))


def _first_line(error: BaseException) -> str:
    return (_STYLES.sub("", str(error)).strip() or type(error).__name__).splitlines()[0][:200]


def _address(data: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


async def write_torch(
    reader: ReadableCheckpoint, selection: Selection, path: Path, read_back: ReadBack, *, allow_pickle: bool
) -> None:
    """A ``.pt`` file with the containers and values as they were. The file is made without its tensors' bytes, mapped,
    and filled in place, so that what it takes of memory is page cache.
    """
    with replacing(path) as scratch:
        tensors = await uncut(partial(_skeleton, scratch, selection, allow_pickle=allow_pickle))
        digests = Digests()
        names = [tensor.name for tensor in selection.tensors]
        async with read_ahead(reader, [whole_tensor(tensor) for tensor in selection.tensors], Trace()) as ahead:
            async for window in ahead:
                await to_thread.run_sync(digests.add, window)
                await to_thread.run_sync(_copy, {names[number]: tensor for number, tensor in window.items()}, tensors)
        tensors.clear()
        await to_thread.run_sync(_sync, scratch)
        await read_back(LocalStorage(scratch), {names[number]: digest for number, digest in digests.found.items()})


def _skeleton(path: Path, selection: Selection, *, allow_pickle: bool) -> dict[str, Tensor]:
    """Makes the file, its storages still empty; returns its tensors, mapped to it, by name."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fakes = {t.name: torch.empty(t.shape, dtype=known_dtype(t.dtype, t.name)) for t in selection.tensors}
    ties = {alias: fakes[name] for alias, name in selection.aliases.items()}
    state = unflatten(selection.tree, {**fakes, **ties}, selection.values, allow_pickle=allow_pickle)
    # To a file that Python has opened: torch's own writer says of a full disk no more than that it was no success.
    skipping = torch.serialization.skip_data(materialize_fake_tensors=True)
    with translated("write", str(path)), open(path, "xb") as file, skipping:
        torch.save(state, file)
    _allocate(path)
    try:
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            flat = flatten(torch.load(path, mmap=True, weights_only=True))
            return flat.tensors | {alias: flat.tensors[name] for alias, name in flat.aliases.items()}
    except pickle.UnpicklingError as error:
        raise UnsupportedFormat(
            "the checkpoint holds values that torch.load(weights_only=True) would refuse; leave them out by keys "
            f"({str(error).strip().splitlines()[0]:.200})",
            path=str(path),
        ) from error


def _allocate(path: Path) -> None:
    """Takes the disk's space for the holes, too: a mapping that finds none when it is written kills the process."""
    with translated("write", str(path)), open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _copy(window: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in window.items():
        tensors[name].copy_(tensor)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
