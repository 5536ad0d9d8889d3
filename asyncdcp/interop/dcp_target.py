"""A DCP directory written from another checkpoint: torch's planner, with tensors that are read as they are written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from functools import partial
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
from torch.utils._pytree import tree_leaves

from asyncdcp.errors import AsyncDCPError, StorageError
from asyncdcp.interop.dcp import FileSystemWriter
from asyncdcp.interop.selection import Selection
from asyncdcp.interop.streaming import Digests, known_dtype, read_tensors, whole_tensor
from asyncdcp.interop.targets import ReadBack, Written, replacing
from asyncdcp.pipeline.formats import ReadableCheckpoint
from asyncdcp.state_dict.unflatten import unflatten
from asyncdcp.storage import LocalStorage
from asyncdcp.threads import ended
from asyncdcp.trace import Trace


async def write_dcp(
    reader: ReadableCheckpoint, selection: Selection, path: Path, read_back: ReadBack, *, allow_pickle: bool
) -> None:
    """A directory that ``torch.distributed.checkpoint.load`` reads. Its plain values are pickled, as DCP does."""
    lazy = _Lazy(reader, selection, asyncio.get_running_loop())
    ties = {alias: lazy.metas[name] for alias, name in selection.aliases.items()}
    state = unflatten(selection.tree, {**lazy.metas, **ties}, selection.values, allow_pickle=allow_pickle)
    with replacing(path) as scratch:
        await _reading_for(lazy, partial(_save, state, scratch, _Planner(lazy)))
        await read_back(LocalStorage(scratch), lazy.written)


async def _reading_for(lazy: _Lazy, function: Callable[[], None]) -> None:
    """Calls the function, which gets from ``lazy``, on a thread. Cancelled, it breaks off the read that the function
    waits for, allows no other, and raises once the function has ended of that.
    """
    work = asyncio.ensure_future(to_thread.run_sync(function))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        lazy.stop()
        with suppress(Exception):
            await ended(work)
        raise


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
        self._task: asyncio.Task[Any] | None = None
        self._stopped = False
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
        tensor = asyncio.run_coroutine_threadsafe(self._read(name), self._loop).result()
        digests = Digests()
        digests.add({0: tensor})
        self.written[name] = digests.found[0]
        return tensor

    async def _read(self, name: str) -> Tensor:
        if self._stopped:
            raise asyncio.CancelledError
        self._task = asyncio.current_task()
        (tensor,) = await read_tensors(self._reader, [whole_tensor(self._chosen[name])], Trace())
        return tensor

    def stop(self) -> None:
        """``get`` raises from now on, the one under way as soon as its read has ended; on the loop's thread."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()


class _Planner(DefaultSavePlanner):
    def __init__(self, lazy: _Lazy) -> None:
        super().__init__()
        self._lazy = lazy

    def lookup_object(self, index: MetadataIndex) -> Any:
        """With its tensors: to DCP a tuple is a value, which holds those that are in it."""
        found = super().lookup_object(index)
        if isinstance(found, Tensor):
            return self._lazy.get(found)
        held = {id(leaf): self._lazy.get(leaf) for leaf in tree_leaves(found) if isinstance(leaf, Tensor)}
        return deepcopy(found, held) if held else found  # a copy is made of nothing that ``held`` has a copy of
