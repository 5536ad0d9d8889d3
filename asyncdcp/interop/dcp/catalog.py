"""From DCP's metadata to asyncdcp's: which tensors and values there are, the entry that holds each chunk, and the
nested state, put together again from its flat names.

DCP stores for each name the path at which it stood. What it does not keep: empty dicts, the types of mappings, and
keys that were no strings, of which the numbers of an optimizer's parameters are given back here, since its
``load_state_dict`` needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

import msgspec
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import Metadata as DcpMetadata
from torch.distributed.checkpoint.metadata import MetadataIndex as DcpIndex

from asyncdcp import metadata as native
from asyncdcp.boxes import Box, contains, tiles, whole
from asyncdcp.errors import CorruptCheckpoint, UnsupportedFormat
from asyncdcp.interop.dcp.entries import Chunk, Entry
from asyncdcp.state_dict.flatten import flatten
from asyncdcp.state_dict.structure import DTYPE_NAMES
from asyncdcp.state_dict.tensors import memory
from asyncdcp.state_dict.values import MAX_DEPTH

Path: TypeAlias = tuple[str | int, ...]
_GAPS = 1000
"""How many entries of a list may be missing: DCP drops empty dicts, and what follows keeps its number."""


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


class _Branch(dict[str | int, Any]):
    """A container under way: a dict, or a list by its indexes."""


def build(paths: Mapping[str, Path], leaves: Mapping[str, Any], location: str) -> Any:
    """The nested state of ``leaves``, each at its path; ``CorruptCheckpoint`` for paths that contradict each other."""
    root = _Branch()
    for name, leaf in leaves.items():
        *outer, last = paths[name]
        if len(outer) >= MAX_DEPTH:
            raise CorruptCheckpoint(
                f"{location}: {name!r:.200} is nested deeper than {MAX_DEPTH} levels", path=location
            )
        branch = root
        for step in outer:
            inner = branch.setdefault(step, _Branch())
            if not isinstance(inner, _Branch):
                raise _contradiction(location, name)
            branch = inner
        if last in branch:
            raise _contradiction(location, name)
        branch[last] = leaf
    return _finished(root, location)


def paths_of(planner_data: Any, names: Iterable[str]) -> dict[str, Path]:
    """The path of each name as the default planner stored it; a name without one is a key of the state itself."""
    known = planner_data if isinstance(planner_data, dict) else {}
    paths = {}
    for name in names:
        path = known.get(name)
        paths[name] = path if isinstance(path, tuple) and path else (name,)
    return paths


def _finished(branch: _Branch, location: str) -> Any:
    entries = {key: _finished(leaf, location) if isinstance(leaf, _Branch) else leaf for key, leaf in branch.items()}
    if all(type(key) is int for key in entries) and entries:
        return _listed({int(key): leaf for key, leaf in entries.items()}, location)
    if any(type(key) is int for key in entries):
        raise CorruptCheckpoint(f"{location}: its names make one container both a dict and a list", path=location)
    _number_parameters(entries)
    return entries


def _listed(entries: dict[int, Any], location: str) -> list[Any]:
    length = max(entries) + 1
    if min(entries) < 0 or length > len(entries) + _GAPS:
        raise CorruptCheckpoint(f"{location}: its names make a list of {length} entries, most missing", path=location)
    return [entries.get(index) for index in range(length)]


def _number_parameters(entries: dict[Any, Any]) -> None:
    """Makes an optimizer's state by number of what DCP made a state by text, if it is one."""
    state, groups = entries.get("state"), entries.get("param_groups")
    if not isinstance(state, dict) or not isinstance(groups, list):
        return
    numbers = {
        str(number): number
        for group in groups
        if isinstance(group, dict) and isinstance(group.get("params"), list)
        for number in group["params"]
        if type(number) is int
    }
    if state and all(key in numbers for key in state):
        entries["state"] = {numbers[key]: leaf for key, leaf in state.items()}


def _contradiction(location: str, name: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"{location}: {name!r:.200} stands where another name does, or within it", path=location)
