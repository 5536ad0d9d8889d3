"""A ``.pt`` file written from another checkpoint: made without its tensors' bytes, mapped, and filled in place."""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from anyio import to_thread
from torch import Tensor

from asyncdcp.errors import UnsupportedFormat
from asyncdcp.interop.selection import Selection
from asyncdcp.interop.streaming import Digests, known_dtype, read_ahead, whole_tensor
from asyncdcp.interop.targets import ReadBack, replacing
from asyncdcp.pipeline.formats import ReadableCheckpoint
from asyncdcp.state_dict.flatten import flatten
from asyncdcp.state_dict.unflatten import unflatten
from asyncdcp.storage import LocalStorage
from asyncdcp.storage.files import translated
from asyncdcp.threads import uncut
from asyncdcp.trace import Trace


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
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, path)
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
