"""asyncdcp's own checkpoints as ``torch.distributed.checkpoint`` sees them: for planners that load from one."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem

from asyncdcp.boxes import Box
from asyncdcp.errors import CheckpointNotFound, CorruptCheckpoint, UnsupportedFormat
from asyncdcp.metadata import Metadata, TensorStorageMetadata
from asyncdcp.pipeline.load import load
from asyncdcp.pipeline.reader import CheckpointReader
from asyncdcp.planning import Want, plan_load
from asyncdcp.state_dict.keys import decode_key
from asyncdcp.state_dict.structure import DTYPES
from asyncdcp.state_dict.targets import TensorTarget
from asyncdcp.state_dict.values import MAX_DEPTH, decode_value
from asyncdcp.storage.local import LocalStorage
from asyncdcp.trace import Trace

_Path = tuple[str | int, ...]


class OwnFormat:
    """The checkpoint of asyncdcp at ``path``, opened anew for each read: each is on a loop of its own."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        self._path = path
        self._metadata = metadata

    @classmethod
    async def find(cls, path: Path) -> OwnFormat | None:
        """None if there is none; raises as ``CheckpointReader.open`` for one that is damaged."""
        try:
            async with await CheckpointReader.open(LocalStorage(path)) as reader:
                return cls(path, reader.metadata)
        except CheckpointNotFound:
            return None

    def described(self) -> dcp.Metadata:
        """As DCP's metadata. Tied tensors are several names of the same bytes."""
        known = self._metadata
        stored: dict[str, Any] = {}
        places: dict[Any, Any] = {}
        for name in (*known.state_dict_metadata, *known.aliases):
            source = known.aliases.get(name, name)
            entry = known.state_dict_metadata[source]
            if not isinstance(entry, TensorStorageMetadata):
                stored[name] = dcp.BytesStorageMetadata()
                places[dcp.MetadataIndex(name)] = _StorageInfo("", 0, entry.length)
                continue
            stored[name] = self._tensor(name, entry)
            for chunk in entry.chunks:
                place = known.storage_data[(source, chunk.offsets)]  # type: ignore[index]  # equal to its NamedTuple
                places[dcp.MetadataIndex(name, chunk.offsets)] = _StorageInfo(place.file, place.begin, place.length)
        paths = dict(_paths(msgspec.json.decode(known.tree), (), 0))
        return dcp.Metadata(stored, planner_data=paths, storage_data=places)

    def read_values(self, items: Sequence[ReadItem]) -> Iterator[tuple[ReadItem, bytes]]:
        """Each as ``torch.save`` would store it, which is what DCP's planners expect."""
        for item in items:
            name = item.storage_index.fqn
            buffer = io.BytesIO()
            torch.save(decode_value(msgspec.json.decode(self._metadata.values[name]), name), buffer)
            yield item, buffer.getvalue()

    async def read_tensors(self, targets: Sequence[tuple[ReadItem, Tensor]]) -> None:
        """Fills the targets, every byte verified."""
        wants, buffers = [], []
        for item, target in targets:
            index = item.storage_index
            begin = index.offset or (0,) * len(item.lengths)
            offsets = tuple(a + b for a, b in zip(begin, item.storage_offsets, strict=True))
            name = self._metadata.aliases.get(index.fqn, index.fqn)
            want = Want(name, Box(offsets, tuple(item.lengths)))
            wants.append(want)
            entry = self._metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            buffers.append(TensorTarget(target, want.box, DTYPES[entry.properties.dtype]))
        async with await CheckpointReader.open(LocalStorage(self._path)) as reader:
            if reader.metadata.storage_meta.save_id != self._metadata.storage_meta.save_id:
                raise CorruptCheckpoint(f"{self._path} was overwritten while it was being loaded", path=str(self._path))
            await load(reader, plan_load(reader.metadata, wants), buffers, Trace())

    def _tensor(self, name: str, entry: TensorStorageMetadata) -> dcp.TensorStorageMetadata:
        dtype = DTYPES.get(entry.properties.dtype)
        if dtype is None:
            what = f"{name} has dtype {entry.properties.dtype}, which this torch does not have"
            raise UnsupportedFormat(what, path=str(self._path), tensors=[name])
        chunks = [dcp.ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks]
        return dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=dtype), torch.Size(entry.size), chunks)


def _paths(node: Any, path: _Path, depth: int) -> Iterator[tuple[str, _Path]]:
    """The path of each leaf as DCP has it: keys as text, a number in lists and tuples."""
    if depth > 2 * MAX_DEPTH or not isinstance(node, dict) or not node:
        raise CorruptCheckpoint("the tree is malformed or nested too deeply")
    tag = next(iter(node))
    content = node[tag]
    if tag in ("t", "v"):
        yield content, path or (content,)
    elif tag in ("list", "tuple"):
        for number, item in enumerate(content):
            yield from _paths(item, (*path, number), depth + 1)
    elif tag in ("dict", "ordered", "defaultdict"):
        for key, item in zip(*content, strict=True):
            yield from _paths(item, (*path, str(decode_key(key))), depth + 1)
    elif tag == "subclass":
        for inner, item in content:
            yield from _paths(item, (*path[:-1], f"{path[-1]}#{inner}"), depth + 1)
    else:
        yield from _paths(content, path, depth + 1)
