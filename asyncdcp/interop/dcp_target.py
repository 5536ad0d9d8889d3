"""A DCP directory written from another checkpoint: torch's planner, with tensors that are read as they are written."""

from __future__ import annotations

import asyncio
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from anyio import to_thread
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from asyncdcp.errors import AsyncDCPError, StorageError
from asyncdcp.interop.dcp import FileSystemWriter
from asyncdcp.interop.selection import Selection
from asyncdcp.interop.streaming import Digests, known_dtype, read_tensors, whole_tensor
from asyncdcp.interop.targets import ReadBack, Written, replacing
from asyncdcp.pipeline.formats import ReadableCheckpoint
from asyncdcp.state_dict.unflatten import unflatten
from asyncdcp.storage import LocalStorage
from asyncdcp.trace import Trace


async def write_dcp(
    reader: ReadableCheckpoint, selection: Selection, path: Path, read_back: ReadBack, *, allow_pickle: bool
) -> None:
    """A directory that ``torch.distributed.checkpoint.load`` reads. Its plain values are pickled, as DCP does."""
    lazy = _Lazy(reader, selection, asyncio.get_running_loop())
    ties = {alias: lazy.metas[name] for alias, name in selection.aliases.items()}
    state = unflatten(selection.tree, {**lazy.metas, **ties}, selection.values, allow_pickle=allow_pickle)
    with replacing(path) as scratch:
        await to_thread.run_sync(_save, state, scratch, _Planner(lazy))
        await read_back(LocalStorage(scratch), lazy.written)


def _save(state: dict[str, Any], path: Path, planner: DefaultSavePlanner) -> None:
    alone = {"no_dist": True} if "no_dist" in signature(save).parameters else {}  # torch 2.6 is, without a group
    try:
        save(state, storage_writer=FileSystemWriter(path), planner=planner, **alone)
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, AsyncDCPError):
                raise cause from None
            if isinstance(cause, OSError):
                raise StorageError(f"{path}: {cause}", path=str(path), errno=cause.errno) from error
        raise AsyncDCPError(f"{path}: torch.distributed.checkpoint failed: {error}", path=str(path)) from error


class _Lazy:
    """Tensors that are read when they are asked for, by the meta tensor that stands for each."""

    def __init__(self, reader: ReadableCheckpoint, selection: Selection, loop: asyncio.AbstractEventLoop) -> None:
        self._reader = reader
        self._loop = loop
        self._chosen = {tensor.name: tensor for tensor in selection.tensors}
        self.metas = {
            name: torch.empty(t.shape, dtype=known_dtype(t.dtype, name), device="meta")
            for name, t in self._chosen.items()
        }
        self._names = {id(meta): name for name, meta in self.metas.items()}
        self.written: Written = {}

    def get(self, meta: Tensor) -> Tensor:
        """The tensor; on a thread that is not the loop's."""
        name = self._names[id(meta)]
        wanted = [whole_tensor(self._chosen[name])]
        (tensor,) = asyncio.run_coroutine_threadsafe(read_tensors(self._reader, wanted, Trace()), self._loop).result()
        digests = Digests()
        digests.add({0: tensor})
        self.written[name] = digests.found[0]
        return tensor


class _Planner(DefaultSavePlanner):
    def __init__(self, lazy: _Lazy) -> None:
        super().__init__()
        self._lazy = lazy

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = super().lookup_object(index)
        return self._lazy.get(found) if isinstance(found, Tensor) else found
