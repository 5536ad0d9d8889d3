"""Weights as Hugging Face keeps them: ``model.safetensors``, or shards beside a ``model.safetensors.index.json``.

For reading, a place is of this format if the caller names a ``.safetensors`` file or an index, or if a directory has an
index or one file of a name that Hugging Face's libraries use. Any other directory with safetensors files is left alone:
one of asyncdcp's own that was never committed has such, too. The format:
https://github.com/huggingface/safetensors#format, and ``transformers``' "Sharded checkpoints".
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Final, NamedTuple

import msgspec

from asyncdcp.boxes import whole
from asyncdcp.errors import CorruptCheckpoint, UnsupportedFormat
from asyncdcp.format.blocks import BLOCK_BYTES
from asyncdcp.format.image import HEADER_LIMIT, SAFETENSORS_DTYPES
from asyncdcp.metadata import (
    DTYPE_SIZES,
    ChunkLocation,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from asyncdcp.pipeline.formats import ForeignPlace
from asyncdcp.pipeline.reader import RangeReader
from asyncdcp.pipeline.union import FileMap
from asyncdcp.storage.port import Storage

INDEX_SUFFIX: Final = ".safetensors.index.json"
_SUFFIX: Final = ".safetensors"
_KNOWN: Final = ("model", "adapter_model", "diffusion_pytorch_model", "pytorch_model")
_INDEX_LIMIT: Final = 1 << 30
_DIMENSIONS: Final = 64
_DTYPES: Final = {stored: name for name, stored in SAFETENSORS_DTYPES.items()} | {"F8_E8M0": "float8_e8m0fnu"}


class _HeaderTensor(msgspec.Struct, frozen=True):
    """A tensor in a file's header; offsets count from the end of the header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _WeightIndex(msgspec.Struct, frozen=True):
    """The part of a sharded model's index that says where each tensor is."""

    weight_map: dict[str, str]


class HeldTensor(NamedTuple):
    """A tensor in a file: its dtype in asyncdcp's terms, its shape, and its bytes from ``begin`` of the file on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    length: int


class HuggingFaceCheckpoint(RangeReader):
    """A ``ReadableCheckpoint``. The format has no checksums: what a file holds is what is read."""

    def __init__(self, storage: Storage, files: Mapping[str, Sequence[HeldTensor]], sizes: Mapping[str, int]) -> None:
        super().__init__(storage, {name: _file_map(name, held, sizes[name]) for name, held in files.items()})
        tensors = {tensor.name: _described(tensor) for held in files.values() for tensor in held}
        places = {
            MetadataIndex(tensor.name, (0,) * len(tensor.shape)): ChunkLocation(name, tensor.begin, tensor.length)
            for name, held in files.items()
            for tensor in held
        }
        meta = StorageMeta(storage.info.location, "safetensors", 1, 0.0, {})
        tree = {"dict": [list(tensors), [{"t": name} for name in tensors]]}
        self.metadata = Metadata({**tensors}, places, meta, {}, msgspec.Raw(msgspec.json.encode(tree)), {})


async def open_huggingface(place: ForeignPlace) -> HuggingFaceCheckpoint | None:
    """The weights at a place, None if it is not of this format. Headers are read and checked, data is not."""
    storage = place.storage
    sizes = await storage.list()
    name = place.name if place.name is not None else _chosen(sizes)
    if name is None or name not in sizes or not name.endswith((_SUFFIX, INDEX_SUFFIX)):
        return None
    indexed = name.endswith(INDEX_SUFFIX)
    wanted = _shards(await storage.get(name, _INDEX_LIMIT), name) if indexed else {name: None}
    files = {}
    for file, names in wanted.items():
        if file not in sizes:
            raise CorruptCheckpoint(f"{name} names {file!r:.200}, which is not there", path=file)
        files[file] = _only(await _header(storage, file, sizes[file]), names, file)
    return HuggingFaceCheckpoint(storage, files, sizes)


def _chosen(sizes: Mapping[str, int]) -> str | None:
    """The index or the file that stands for a directory."""
    indexes = [name for name in sizes if name.endswith(INDEX_SUFFIX)]
    if indexes:
        return indexes[0] if len(indexes) == 1 else None
    files = [name for name in (f"{stem}{_SUFFIX}" for stem in _KNOWN) if name in sizes]
    return files[0] if len(files) == 1 else None


def _shards(data: bytes, name: str) -> dict[str, set[str] | None]:
    """The tensors that an index wants of each file."""
    try:
        index = msgspec.json.decode(data, type=_WeightIndex)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{name} is no index of safetensors files ({error})", path=name) from error
    shards: dict[str, set[str] | None] = {}
    for tensor, file in index.weight_map.items():
        names = shards.setdefault(file, set())
        assert names is not None
        names.add(tensor)
    return shards


def _only(held: list[HeldTensor], names: set[str] | None, file: str) -> list[HeldTensor]:
    """The tensors that the index assigns to this file, all of which it must have; all, if there is no index."""
    if names is None:
        return held
    found = [tensor for tensor in held if tensor.name in names]
    if len(found) != len(names):
        missing = sorted(names - {tensor.name for tensor in found})
        raise CorruptCheckpoint(f"{file} lacks {', '.join(missing[:5])}, which the index places there", path=file)
    return found


async def _header(storage: Storage, file: str, size: int) -> list[HeldTensor]:
    source = await storage.open(file)
    try:
        start = bytearray(8)
        if await source.read(0, [memoryview(start)]) < len(start):
            raise CorruptCheckpoint(f"{file} is too short for a safetensors file", path=file)
        (length,) = struct.unpack("<Q", start)
        if length > min(HEADER_LIMIT, size - 8):
            raise CorruptCheckpoint(f"{file} is no safetensors file: its header has {length} bytes", path=file)
        text = bytearray(length)
        await source.read(8, [memoryview(text)])
    except EOFError as error:
        raise CorruptCheckpoint(f"{file} has become shorter", path=file) from error
    finally:
        await source.aclose()
    return parse_header(bytes(text), size - 8 - length, file)


def parse_header(text: bytes, data_bytes: int, file: str) -> list[HeldTensor]:
    """The tensors of a header (its JSON), in the order of their bytes; ``CorruptCheckpoint`` unless they tile
    ``data_bytes``.
    """
    try:
        fields: dict[str, msgspec.Raw] = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        raw = {name: msgspec.json.decode(v, type=_HeaderTensor) for name, v in fields.items() if name != "__metadata__"}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{file} is no safetensors file ({error})", path=file) from error
    held = []
    end = 0
    for name, tensor in sorted(raw.items(), key=lambda item: item[1].data_offsets):
        first, last = tensor.data_offsets
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None:
            raise UnsupportedFormat(f"{file}: {name!r:.200} has the dtype {tensor.dtype:.40}, unknown here", path=file)
        valid = len(tensor.shape) <= _DIMENSIONS and all(0 <= extent < 1 << 48 for extent in tensor.shape)
        if not valid or first != end or last - first != prod(tensor.shape) * DTYPE_SIZES[dtype]:
            raise CorruptCheckpoint(f"{file}: the header's entry of {name!r:.200} cannot be", path=file, tensors=[name])
        held.append(HeldTensor(name, dtype, tuple(tensor.shape), 8 + len(text) + first, last - first))
        end = last
    if end != data_bytes:
        raise CorruptCheckpoint(f"{file} has {data_bytes} bytes of data, its header tells of {end}", path=file)
    return held


def _described(tensor: HeldTensor) -> TensorStorageMetadata:
    box = whole(tensor.shape)
    chunk = ChunkStorageMetadata(box.offsets, box.sizes)
    return TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, (chunk,))


def _file_map(name: str, held: Sequence[HeldTensor], size: int) -> FileMap:
    return FileMap(name, size, BLOCK_BYTES, None, [tensor.begin for tensor in held], [tensor.name for tensor in held])


# ── for writing ──


def shard_names(count: int) -> list[str]:
    """What Hugging Face calls the files of a model of ``count`` shards."""
    if count == 1:
        return [f"model{_SUFFIX}"]
    return [f"model-{number:05d}-of-{count:05d}{_SUFFIX}" for number in range(1, count + 1)]


def encode_weight_index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """The index of a model of several shards. ``total_size`` is the bytes of all tensors."""
    content: dict[str, Any] = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
