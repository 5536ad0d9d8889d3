"""``FileSystemWriter`` for ``torch.distributed.checkpoint``: torch's format or asyncdcp's, by one storage layer."""

from __future__ import annotations

import dataclasses
import heapq
import io
import os
import pickle
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from anyio.from_thread import start_blocking_portal
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from asyncdcp.errors import CheckpointExists, InvalidOption
from asyncdcp.interop.dcp.metadata_file import folder_of, publish, remove_unnamed
from asyncdcp.interop.dcp.new_files import NewFiles, ObjectStream, Unclosing, Unsynced
from asyncdcp.interop.dcp.own_commit import commit, standing
from asyncdcp.interop.dcp.own_writing import write_part
from asyncdcp.storage.local import LocalStorage
from asyncdcp.warn import warn_caller

_OVERHEAD = 2048
"""About what ``torch.save`` adds to a tensor's bytes."""


class FileSystemWriter(StorageWriter, BlockingAsyncStager):
    """In the place of torch's class of this name: the same parameters, and a directory that torch's reader opens.

    What differs: bytes go to the disk by direct I/O while the next are serialized; a save is durable when it returns,
    directories included; one that overwrites leaves the old checkpoint whole until the new one takes its place in a
    single step, then removes the old files; and one that fails removes what it wrote, and is never published.

    With ``SerializationFormat.SAFETENSORS`` it writes asyncdcp's own format, which ``AsyncCheckpointer.load``, the
    command line and asyncdcp's ``FileSystemReader`` open, and torch's reader does not. Its files are as the format has
    them: one for each rank, whatever ``single_file_per_rank`` and ``thread_count`` say. Values of types that the format
    does not know are pickled, and load only by ``AsyncCheckpointer.load(..., allow_pickle=True)``. Ranks that are not
    coordinated save a checkpoint each, in directories ``__<rank>``. A place holds one format: ``CheckpointExists``
    where it has a checkpoint of the other.

    ``thread_count`` files are written at once by each rank. ``per_thread_copy_ahead`` is how many bytes of each may be
    in memory on their way to the disk (32 MiB at least). Without ``sync_files`` nothing is synced.
    """

    def __init__(  # noqa: PLR0913  # as torch has them
        self,
        path: str | os.PathLike[str],
        single_file_per_rank: bool = True,  # noqa: FBT001, FBT002
        sync_files: bool = True,  # noqa: FBT001, FBT002
        thread_count: int = 1,
        per_thread_copy_ahead: int = 10_000_000,
        cache_staged_state_dict: bool = False,  # noqa: FBT001, FBT002
        overwrite: bool = True,  # noqa: FBT001, FBT002
        _extensions: Sequence[Any] | None = None,
        serialization_format: Any = "torch_save",
    ) -> None:
        BlockingAsyncStager.__init__(self, cache_staged_state_dict=cache_staged_state_dict)
        if thread_count < 1:
            raise InvalidOption(f"thread_count is {thread_count}; it takes 1 or more")
        form = getattr(serialization_format, "value", serialization_format)
        if form not in ("torch_save", "safetensors"):
            raise InvalidOption(f"serialization_format is {serialization_format}; it takes TORCH_SAVE or SAFETENSORS")
        if form == "safetensors" and _extensions:
            raise InvalidOption(
                "_extensions transform torch's files, and SAFETENSORS writes asyncdcp's own; "
                "AsyncCheckpointer(extensions=...) transforms those"
            )
        self.path = folder_of(path)
        self.single_file_per_rank = single_file_per_rank
        self.sync_files = sync_files
        self.thread_count = thread_count
        self.per_thread_copy_ahead = per_thread_copy_ahead
        self.overwrite = overwrite
        self.extensions = tuple(_extensions or ())
        self.serialization_format = serialization_format
        self.is_own_format = form == "safetensors"
        self.save_id = str(uuid.uuid4())
        self.rank: int | None = None
        self.use_collectives = True

    # ── what DCP calls, in this order ───────────────────────────────────────────────────────────────────────────────

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id:
            self.path = folder_of(checkpoint_id)
        self.save_id = str(uuid.uuid4())

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001
        self.rank = kwargs.get("rank")
        self.use_collectives = kwargs.get("use_collectives", True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Warns of a checkpoint that is there, or raises ``RuntimeError`` where it is not to be overwritten."""
        if self._is_there():
            if not self.overwrite:
                raise RuntimeError(f"Checkpoint already exists and {self.overwrite=}.")
            warn_caller(
                f"Detected an existing checkpoint in {self.path}, overwriting since {self.overwrite=}.", UserWarning
            )
        if self._is_alone:
            return dataclasses.replace(plan, storage_data=_StoragePrefix(f"__{self.rank}_"))
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [
            dataclasses.replace(plan, storage_data=_StoragePrefix(f"__{rank}_")) if plan.storage_data is None else plan
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes the plan's items; all of them durable on return, or nothing left of them if it raises."""
        with start_blocking_portal("asyncio") as portal:
            files = NewFiles(portal, self._storage(), self.save_id)
            with files.removed_on_error():
                if self.is_own_format:
                    results = write_part(files, plan.items, planner, self.per_thread_copy_ahead)
                else:
                    size = self.thread_count if self.single_file_per_rank else None
                    results = self._write_files(files, split(plan.items, plan.storage_data.prefix, size), planner)
                files.barrier()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publishes the checkpoint, then removes the files of the one whose place it takes."""
        if self.is_own_format:
            with start_blocking_portal("asyncio") as portal:
                save_id = portal.call(partial(commit, overwrite=self.overwrite), self._storage(), metadata, results)
            metadata.storage_data = {}
            metadata.storage_meta = StorageMeta(checkpoint_id=self.checkpoint_id, save_id=save_id)
            return
        if hasattr(filesystem, "CURRENT_DCP_VERSION"):
            metadata.version = filesystem.CURRENT_DCP_VERSION
        metadata.storage_data = {result.index: result.storage_data for part in results for result in part}
        metadata.storage_meta = self.storage_meta()
        publish(self._metadata_path, pickle.dumps(metadata), sync=self.sync_files)
        named = {info.relative_path for info in metadata.storage_data.values()}
        remove_unnamed(self._metadata_path, f"__{self.rank}_" if self._is_alone else "__", named)

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self.save_id)

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return filesystem.FileSystem.validate_checkpoint_id(checkpoint_id)

    # ── staging ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy on the CPU. With ``cache_staged_state_dict`` it takes the memory of the last one, which must have been
        written by then.
        """
        if self.cache_staged_state_dict and self.state_dict_cache is None and not torch.accelerator.is_available():
            from torch.distributed._state_dict_utils import _create_cpu_state_dict

            self.state_dict_cache = _create_cpu_state_dict(state_dict)  # torch's own would be pinned
        return super().stage(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """For ``async_save``'s process, which gets the staged state by itself."""
        return {**vars(self), "state_dict_cache": None}

    # ── one file ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _is_alone(self) -> bool:
        return self.rank is not None and not self.use_collectives

    @property
    def _metadata_path(self) -> Path:
        """Each rank's own where ranks are not coordinated: another's may be of this very save."""
        return self.path / (f"__{self.rank}.metadata" if self._is_alone else ".metadata")

    @property
    def _own_path(self) -> Path:
        """Where asyncdcp's own format goes."""
        return self.path / f"__{self.rank}" if self._is_alone else self.path

    def _is_there(self) -> bool:
        """Whether there is a checkpoint to be overwritten; ``CheckpointExists`` for one of the other format."""
        with start_blocking_portal("asyncio") as portal:
            own = portal.call(standing, LocalStorage(self._own_path))
        torchs = self._metadata_path.exists()
        if torchs if self.is_own_format else own:
            raise CheckpointExists(
                f"{self.path} holds a checkpoint of another format; save to another path, or remove it first",
                path=os.fspath(self.path),
            )
        return own or torchs

    def _storage(self) -> LocalStorage:
        path = self._own_path if self.is_own_format else self.path
        return LocalStorage(path) if self.sync_files else LocalStorage(path, posix=Unsynced())

    def _write_files(self, files: NewFiles, buckets: list[Bucket], planner: SavePlanner) -> list[WriteResult]:
        if self.thread_count == 1:
            parts = [self._write_file(files, bucket, planner) for bucket in buckets]
            return [result for part in parts for result in part]
        with ThreadPoolExecutor(self.thread_count) as threads:
            try:
                work = [threads.submit(self._write_file, files, bucket, planner) for bucket in buckets]
                return [result for future in work for result in future.result()]
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise

    def _write_file(self, files: NewFiles, bucket: Bucket, planner: SavePlanner) -> list[WriteResult]:
        hint = 0 if self.extensions else sum(bucket.sizes) + _OVERHEAD * len(bucket.items)
        with files.create(bucket.name, hint, self.per_thread_copy_ahead) as stream:
            return [self._write_item(stream, item, planner) for item in bucket.items]

    def _write_item(self, stream: ObjectStream, item: WriteItem, planner: SavePlanner) -> WriteResult:
        begin = stream.tell()
        data = planner.resolve_data(item)
        target: Any = Unclosing(stream)
        for extension in self.extensions:
            target = extension.transform_to(target)
        if item.type == WriteItemType.BYTE_IO:
            assert isinstance(data, io.BytesIO)
            target.write(data.getbuffer())
        else:
            assert isinstance(data, Tensor)
            torch.save(_packed(data), target)
        target.close()
        length = stream.tell() - begin
        # In the order in which readers undo them. Torch's writer turns it round, and torch's reader then cannot.
        transforms = [extension.get_descriptor() for extension in self.extensions]
        info = _StorageInfo(stream.name, begin, length, **({"transform_descriptors": transforms} if transforms else {}))
        return WriteResult(index=item.index, size_in_bytes=length, storage_data=info)


def _packed(tensor: Tensor) -> Tensor:
    """On the CPU, with a storage that has nothing else, since ``torch.save`` writes storages whole."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class Bucket(NamedTuple):
    """The items of one file, values first, and the bytes of each."""

    name: str
    items: list[WriteItem]
    sizes: list[int]


def split(items: Sequence[WriteItem], prefix: str, count: int | None) -> list[Bucket]:
    """So many files of about equal size, in which every item stands in the plan's order; a file each for None."""
    if count is None:
        groups = [[item] for item in items]
    elif count == 1:
        groups = [list(items)]
    else:
        groups = _balanced(items, count)
    return [_bucket(f"{prefix}{number}.distcp", group) for number, group in enumerate(groups)]


def _balanced(items: Sequence[WriteItem], count: int) -> list[list[WriteItem]]:
    """The largest first, each to the group that has the least."""
    groups: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for index in sorted(range(len(items)), key=lambda index: -_size(items[index])):
        filled, number = heapq.heappop(heap)
        groups[number].append(index)
        heapq.heappush(heap, (filled + max(_size(items[index]), 1), number))
    return [[items[index] for index in sorted(group)] for group in groups]


def _bucket(name: str, items: list[WriteItem]) -> Bucket:
    ordered = sorted(items, key=lambda item: item.tensor_data is not None)
    return Bucket(name, ordered, [_size(item) for item in ordered])


def _size(item: WriteItem) -> int:
    """A chunk's bytes as far as the plan knows; a value's are not known before it is serialized."""
    data = item.tensor_data
    return 0 if data is None else prod(data.chunk.sizes) * data.properties.dtype.itemsize
