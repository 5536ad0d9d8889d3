"""From DCP's metadata to asyncdcp's: which tensors and values there are, and the entry that holds each chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import msgspec
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import Metadata as DcpMetadata
from torch.distributed.checkpoint.metadata import MetadataIndex as DcpIndex

from asyncdcp import metadata as native
from asyncdcp.boxes import Box, contains, tiles, whole
from asyncdcp.errors import CorruptCheckpoint, UnsupportedFormat
from asyncdcp.interop.dcp.entries import Chunk, Entry
from asyncdcp.interop.dcp.skeleton import build, paths_of
from asyncdcp.interop.memory import memory
from asyncdcp.state_dict.flatten import flatten
from asyncdcp.state_dict.structure import DTYPE_NAMES


@dataclass
class Catalog:
    """What one or several ``.metadata`` files list, held against each other and against the sizes of the files.

    Where several list a name (each rank its own, without coordination), the first one's counts.
    """

    location: str
    sizes: Mapping[str, int]
    tensors: dict[str, TensorStorageMetadata] = field(default_factory=dict)
    chunks: dict[str, dict[Box, Entry]] = field(default_factory=dict)
    """The entries of each tensor's chunks, which cover it exactly."""
    values: dict[str, Entry] = field(default_factory=dict)
    paths: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    save_id: str = ""

    def add(self, found: DcpMetadata) -> None:
        """``CorruptCheckpoint`` for what is not whole."""
        stored = found.state_dict_metadata
        meta = found.storage_meta
        self.save_id = self.save_id or (meta.save_id if meta is not None and meta.save_id else "")
        for name, path in paths_of(found.planner_data, stored).items():
            self.paths.setdefault(name, path)
        for name, entry in stored.items():
            if name in self.tensors or name in self.values:
                continue
            if isinstance(entry, BytesStorageMetadata):
                self.values[name] = self._entry(found, name, None)
            else:
                self.tensors[name] = entry
                self.chunks[name] = self._chunks(found, name, entry)

    def chunk(self, name: str, box: Box) -> Chunk:
        return Chunk(self.tensors[name].properties.dtype, box.sizes)

    def _chunks(self, found: DcpMetadata, name: str, tensor: TensorStorageMetadata) -> dict[Box, Entry]:
        if tensor.properties.dtype not in DTYPE_NAMES:
            raise UnsupportedFormat(f"{self.location}: {name} has dtype {tensor.properties.dtype}", tensors=[name])
        target = whole(tensor.size)
        boxes = dict.fromkeys(Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks)
        if not all(contains(target, box) for box in boxes) or not (list(boxes) == [target] or tiles(target, boxes)):
            self._corrupt(f"the chunks of {name} do not cover it exactly (shape {list(tensor.size)})", name)
        return {box: self._entry(found, name, box) for box in boxes if box.volume}  # ranks may have empty shards

    def _entry(self, found: DcpMetadata, name: str, box: Box | None) -> Entry:
        places = found.storage_data
        info = places.get(DcpIndex(name, box.offsets)) if box is not None else places.get(DcpIndex(name))
        if info is None:
            self._corrupt(f"nothing says where {name} lies", name)
        size = self.sizes.get(info.relative_path)
        if size is None or info.offset + info.length > size:
            problem = "is missing" if size is None else f"has {size} bytes, and an entry ends beyond"
            self._corrupt(f"the file {info.relative_path} {problem}; it holds {name}", name)
        transforms = tuple(getattr(info, "transform_descriptors", None) or ())
        return Entry(name, info.relative_path, info.offset, info.length, transforms)

    def _corrupt(self, what: str, name: str) -> NoReturn:
        raise CorruptCheckpoint(f"{self.location}: {what}", path=self.location, tensors=[name])


@dataclass(frozen=True)
class Described:
    """A catalog as asyncdcp's metadata. The file of each location is a key of ``entries`` or ``held``."""

    metadata: native.Metadata
    entries: dict[str, tuple[Entry, Chunk]]
    held: dict[str, memoryview | bytes]
    """The bytes of tensors inside values, which were read with them."""


def describe(catalog: Catalog, values: Mapping[str, Any]) -> Described:
    """``values`` are the decoded ones of ``catalog.values``, by name. Blocks; for a thread."""
    blanks = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")
        for name, tensor in catalog.tensors.items()
    }
    names = {id(blank): name for name, blank in blanks.items()}
    leaves = {**blanks, **values}
    state = build(catalog.paths, {name: leaves[name] for name in catalog.paths}, catalog.location)
    flat = flatten(state, allow_pickle=True, allow_meta=True)
    encoded = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in flat.values.items()}
    stored: dict[str, native.TensorStorageMetadata | native.BytesStorageMetadata] = {
        name: native.BytesStorageMetadata(len(bytes(value))) for name, value in encoded.items()
    }
    places: dict[native.MetadataIndex, native.ChunkLocation] = {}
    entries: dict[str, tuple[Entry, Chunk]] = {}
    held: dict[str, memoryview | bytes] = {}
    for fqn, tensor in flat.tensors.items():
        name = names.get(id(tensor))
        boxes = list(catalog.chunks[name]) if name is not None else []
        boxes = boxes or [whole(tensor.shape)]
        stored[fqn] = _stored(tensor, boxes)
        for box in boxes:
            chunk = Chunk(tensor.dtype, box.sizes)
            if name is None:
                key = f"{fqn}:held"
                held[key] = _held(catalog, fqn, tensor)
            elif not chunk.nbytes:
                key = "nowhere"
            else:
                entry = catalog.chunks[name][box]
                key = f"{entry.path}:{entry.offset}"
                entries[key] = (entry, chunk)
            places[native.MetadataIndex(fqn, box.offsets)] = native.ChunkLocation(key, 0, chunk.nbytes)
    meta = native.StorageMeta(catalog.location, catalog.save_id, 1, 0.0, {})
    tree = msgspec.Raw(msgspec.json.encode(flat.tree))
    return Described(native.Metadata(stored, places, meta, flat.aliases, tree, encoded), entries, held)


def _stored(tensor: torch.Tensor, boxes: Sequence[Box]) -> native.TensorStorageMetadata:
    chunks = tuple(native.ChunkStorageMetadata(box.offsets, box.sizes) for box in boxes)
    return native.TensorStorageMetadata(native.TensorProperties(DTYPE_NAMES[tensor.dtype]), tuple(tensor.shape), chunks)


def _held(catalog: Catalog, fqn: str, tensor: torch.Tensor) -> memoryview | bytes:
    try:
        return memory(tensor)
    except ValueError as error:
        raise CorruptCheckpoint(f"{catalog.location}: in a value, {fqn}: {error}", tensors=[fqn]) from error
