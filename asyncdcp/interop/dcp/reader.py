"""``FileSystemReader`` for ``torch.distributed.checkpoint``: what either writer wrote, read in ranges."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from anyio.from_thread import start_blocking_portal
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import Metadata as DcpMetadata
from torch.distributed.checkpoint.metadata import StorageMeta as DcpStorageMeta
from torch.distributed.checkpoint.metadata import TensorStorageMetadata as DcpTensor
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from asyncdcp import metadata as native
from asyncdcp.boxes import Box, whole
from asyncdcp.interop.dcp.catalog import Described
from asyncdcp.interop.dcp.checkpoint import DcpCheckpoint, for_each, read_entry
from asyncdcp.interop.dcp.entries import VALUE_LIMIT, Chunk, Entry, undo
from asyncdcp.interop.dcp.metadata_file import folder_of, load_metadata
from asyncdcp.interop.dcp.own_format import OwnFormat
from asyncdcp.metadata import INDEX_LIMIT
from asyncdcp.pipeline.load import load
from asyncdcp.planning import Want, plan_load
from asyncdcp.state_dict.structure import DTYPE_NAMES
from asyncdcp.state_dict.targets import TensorTarget
from asyncdcp.storage.local import ForeignDirectory
from asyncdcp.storage.port import ObjectReader
from asyncdcp.trace import Trace

_BATCH_BYTES = 1 << 30
"""About so much is asked of the planner before it is read: planners may make tensors for the occasion."""


class FileSystemReader(StorageReader):
    """In the place of torch's class of this name: the same parameters, for what either writer wrote, and for asyncdcp's
    own checkpoints.

    What differs: of a sharded tensor only the ranges that are wanted are read, several at a time, straight into the
    targets where they take them; what has a checksum is verified; and ``.metadata`` is unpickled by a list of DCP's own
    classes (``CorruptCheckpoint`` for anything else).
    """

    def __init__(self, path: str | os.PathLike[str], _extension_registry: Any = None) -> None:
        self.path = folder_of(path)
        self.storage_data: dict[Any, Any] = {}
        self.load_id = str(uuid.uuid4())
        self.extension_registry = _extension_registry
        self.rank: int | None = None
        self.use_collectives = True
        self._tensors: dict[str, DcpTensor] = {}
        self._own: OwnFormat | None = None

    # ── what DCP calls, in this order ───────────────────────────────────────────────────────────────────────────────

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.storage_data = {}
        self._own = None
        if checkpoint_id:
            self.path = folder_of(checkpoint_id)
        self.load_id = str(uuid.uuid4())

    def read_metadata(self, *args: Any, **kwargs: Any) -> DcpMetadata:
        rank = kwargs.get("rank")
        name = ".metadata" if rank is None else f"__{rank}.metadata"
        with start_blocking_portal("asyncio") as portal:
            try:
                data = portal.call(ForeignDirectory(self.path).get, name, INDEX_LIMIT)
            except FileNotFoundError:
                own = self.path if rank is None else self.path / f"__{rank}"
                self._own = portal.call(OwnFormat.find, own)
                if self._own is None:
                    raise
        metadata = self._own.described() if self._own is not None else load_metadata(data, str(self.path / name))
        if metadata.storage_meta is None:
            metadata.storage_meta = DcpStorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def set_up_storage_reader(
        self,
        metadata: DcpMetadata,
        is_coordinator: bool,  # noqa: FBT001
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self.storage_data = metadata.storage_data
        self._tensors = {
            name: entry for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, DcpTensor)
        }
        self.rank = kwargs.get("rank")
        self.use_collectives = kwargs.get("use_collectives", True)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads the plan's items. Planners are called on the caller's thread, in the order in which the items lie."""
        values = [item for item in plan.items if item.type == LoadItemType.BYTE_IO]
        tensors = [item for item in plan.items if item.type != LoadItemType.BYTE_IO]
        storage = ForeignDirectory(self.path)
        with start_blocking_portal("asyncio") as portal:
            found = self._own.read_values(values) if self._own else portal.call(self._read_values, storage, values)
            for item, data in found:
                planner.load_bytes(item, io.BytesIO(data))
            sizes = portal.call(storage.list)
            for batch in self._batches(tensors):
                targets = [(item, planner.resolve_tensor(item).detach()) for item in batch]
                for item, target in targets:
                    _check_size(item, target)
                if self._own is not None:
                    portal.call(self._own.read_tensors, targets)
                else:
                    portal.call(self._read_tensors, storage, sizes, targets)
                for item, target in targets:
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return filesystem.FileSystem.validate_checkpoint_id(checkpoint_id)

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _read_values(
        self, storage: ForeignDirectory, items: Sequence[ReadItem]
    ) -> list[tuple[ReadItem, bytes | bytearray]]:
        found: dict[int, bytes | bytearray] = {}

        async def take(number: int, source: ObjectReader) -> None:
            entry = self._entry(items[number])
            data = await read_entry(source, entry.offset, entry.length)
            found[number] = undo(entry, data, VALUE_LIMIT, self.extension_registry)

        await for_each(storage, range(len(items)), lambda number: self._entry(items[number]), take)
        return [(item, found[number]) for number, item in enumerate(items)]

    async def _read_tensors(
        self, storage: ForeignDirectory, sizes: dict[str, int], targets: Sequence[tuple[ReadItem, Tensor]]
    ) -> None:
        """To asyncdcp each stored chunk is a tensor of its own, of which the items want boxes."""
        entries: dict[str, tuple[Entry, Chunk]] = {}
        stored: dict[str, native.TensorStorageMetadata | native.BytesStorageMetadata] = {}
        places: dict[native.MetadataIndex, native.ChunkLocation] = {}
        wants, buffers = [], []
        for item, target in targets:
            entry, chunk = self._entry(item), self._chunk(item)
            key, box = f"{entry.path}:{entry.offset}", whole(chunk.sizes)
            entries[key] = (entry, chunk)
            stored[key] = native.TensorStorageMetadata(
                native.TensorProperties(DTYPE_NAMES[chunk.dtype]),
                chunk.sizes,
                (native.ChunkStorageMetadata(box.offsets, box.sizes),),
            )
            places[native.MetadataIndex(key, box.offsets)] = native.ChunkLocation(key, 0, chunk.nbytes)
            part = Box(tuple(item.storage_offsets), tuple(item.lengths))
            wants.append(Want(key, part))
            buffers.append(TensorTarget(target, part, chunk.dtype))
        meta = native.StorageMeta(str(self.path), "", 1, 0.0, {})
        metadata = native.Metadata(stored, places, meta, {}, msgspec.Raw(b"null"), {})
        reader = DcpCheckpoint(storage, sizes, Described(metadata, entries, {}), self.extension_registry)
        await load(reader, plan_load(metadata, wants), buffers, Trace())

    def _batches(self, items: Sequence[ReadItem]) -> Iterator[list[ReadItem]]:
        """In the order in which the items lie in the files."""
        batch: list[ReadItem] = []
        nbytes = 0
        for item in sorted(items, key=lambda item: self._entry(item)[1:3]):
            batch.append(item)
            nbytes += Chunk(self._chunk(item).dtype, tuple(item.lengths)).nbytes
            if nbytes >= _BATCH_BYTES:
                yield batch
                batch, nbytes = [], 0
        if batch:
            yield batch

    def _entry(self, item: ReadItem) -> Entry:
        index = item.storage_index
        info = self.storage_data[index]
        transforms = tuple(getattr(info, "transform_descriptors", None) or ())
        return Entry(index.fqn, info.relative_path, info.offset, info.length, transforms)

    def _chunk(self, item: ReadItem) -> Chunk:
        index, tensor = item.storage_index, self._tensors[item.storage_index.fqn]
        for chunk in self._candidates(tensor, index.index):
            if index.offset is None or tuple(chunk.offsets) == tuple(index.offset):
                return Chunk(tensor.properties.dtype, tuple(chunk.sizes))
        raise ValueError(f"the checkpoint has no chunk of {index.fqn} at {index.offset}")

    @staticmethod
    def _candidates(tensor: DcpTensor, hint: int | None) -> Iterator[Any]:
        if hint is not None and 0 <= hint < len(tensor.chunks):
            yield tensor.chunks[hint]
        yield from tensor.chunks


def _check_size(item: ReadItem, target: Tensor) -> None:
    if tuple(target.size()) != tuple(item.lengths):
        raise AssertionError(f"req {item.storage_index} mismatch sizes {target.size()} vs {item.lengths}")
