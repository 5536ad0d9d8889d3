"""What ``torch.save`` wrote: a ``.pt`` file, mapped, so that only what a load wants is read.

The file's pickle is loaded with ``weights_only=True``, which makes nothing but tensors and plain containers; anything
else in it is refused.
"""

from __future__ import annotations

import ctypes
import os
import pickle
from collections.abc import Sequence
from typing import Final

import msgspec
import torch
from anyio import to_thread
from torch import Tensor

from asyncdcp.boxes import whole
from asyncdcp.errors import CorruptCheckpoint, UnsupportedFormat
from asyncdcp.interop.memory import memory
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
from asyncdcp.pipeline.windows import ReadRange
from asyncdcp.state_dict.flatten import FlatState, flatten
from asyncdcp.state_dict.structure import DTYPE_NAMES
from asyncdcp.storage.foreign import ForeignPlace
from asyncdcp.storage.local import LocalStorage
from asyncdcp.trace import Trace

_ZIP: Final = b"PK\x03\x04"


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
        if file.read(len(_ZIP)) != _ZIP:
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
        raise CorruptCheckpoint(f"{path} is no file of torch.save ({_first_line(error)})", path=path) from error
    if isinstance(state, Tensor) or not isinstance(state, dict):
        raise UnsupportedFormat(f"{path} holds a {type(state).__name__}, not a dict", path=path)
    return TorchFileCheckpoint(path, flatten(state))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _address(data: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))
