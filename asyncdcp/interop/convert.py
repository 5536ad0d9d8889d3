"""From any checkpoint that can be opened to any format that can be written: streamed, all or nothing, verified."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from asyncdcp.config import check_flags
from asyncdcp.errors import CorruptCheckpoint, InvalidOption, plain
from asyncdcp.interop.selection import Selection, select
from asyncdcp.interop.streaming import Digests, read_ahead, whole_tensor
from asyncdcp.interop.targets import SHARD_BYTES, Written, write_huggingface, write_native
from asyncdcp.interop.torch_file import write_torch
from asyncdcp.pipeline.formats import ReadableCheckpoint, open_checkpoint
from asyncdcp.state_dict.options import check_keys, is_renaming
from asyncdcp.storage import LocalStorage, Storage, open_storage
from asyncdcp.trace import Trace

Format: TypeAlias = Literal["native", "dcp", "hf", "torch", "safetensors"]
FORMATS: tuple[Format, ...] = get_args(Format)
_ONLY_TENSORS: Final = ("hf", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What becomes of a checkpoint on the way. ``keys`` are globs of names to take; ``rename`` maps names, or prefixes
    of them up to a dot ("" is all), to new ones; ``dtype`` is what floating point numbers become, such as "bfloat16".
    ``shard_bytes`` bounds a Hugging Face shard. ``allow_pickle`` is for values that were stored with it.
    """

    keys: Sequence[str] | None = None
    rename: Mapping[str, str] | None = None
    dtype: str | None = None
    shard_bytes: int = SHARD_BYTES
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        check_keys(self.keys)
        check_flags(allow_pickle=self.allow_pickle)
        if not (self.rename is None or is_renaming(self.rename)):
            raise InvalidOption(f"rename takes a mapping of names, such as {{'model': ''}}, not {self.rename!r:.80}")
        if not isinstance(self.shard_bytes, int) or self.shard_bytes < 1:
            raise InvalidOption(f"shard_bytes takes a whole number of 1 or more, not {self.shard_bytes!r}")


@dataclass(frozen=True)
class Conversion:
    """What was written: tensors, their bytes, how many plain values, and the names of values that the format cannot
    hold.
    """

    path: str
    format: Format
    tensors: int
    tensor_bytes: int
    values: int
    left_out: tuple[str, ...]


async def convert(
    source: str | os.PathLike[str] | Storage,
    target: str | os.PathLike[str] | Storage,
    to: Format = "native",
    changes: Changes | None = None,
) -> Conversion:
    """Writes the checkpoint at ``source`` anew at ``target``.

    Guaranteed: ``target`` is there whole or not at all; what it holds was read again and compared with what was read
    from ``source``, but for values that only unpickling would show; memory holds some windows of 64 MiB, or the largest
    tensors. "safetensors" and "hf" are one format: a directory of ``model.safetensors``, or of shards with an index,
    tensors only.

    Raises ``CheckpointNotFound``, ``CheckpointExists``, ``InvalidOption``, ``UnsupportedFormat`` for what the format
    cannot hold, ``CorruptCheckpoint``, ``StorageError``. Runs on asyncio.
    """
    changes = changes or Changes()
    if to not in FORMATS:
        raise InvalidOption(f"to takes one of {', '.join(FORMATS)}, not {to!r}")
    storage, place = open_storage(source), open_storage(target)
    async with aclosing(await open_checkpoint(storage)) as reader:
        selection = select(reader.metadata, changes.keys, changes.rename, changes.dtype)
        await _write(reader, selection, place, to, changes)
    only_tensors = to in _ONLY_TENSORS
    sizes = [whole_tensor(tensor).nbytes for tensor in selection.tensors]
    left_out = tuple(selection.values) if only_tensors else ()
    kept = 0 if only_tensors else len(selection.values)
    return Conversion(place.info.location, to, len(sizes), sum(sizes), kept, left_out)


async def _write(
    reader: ReadableCheckpoint, selection: Selection, storage: Storage, to: Format, changes: Changes
) -> None:
    kept = replace(selection, values={}) if to in _ONLY_TENSORS else selection

    async def read_back(place: Storage, written: Written) -> None:
        async with aclosing(await open_checkpoint(place)) as found:
            await _compare(found, kept, written, storage.info.location)

    if to == "native":
        metadata = {"converted_from": plain(reader.metadata.storage_meta.checkpoint_id)}
        metadata = {**reader.metadata.storage_meta.user, **metadata}
        return await write_native(reader, selection, storage, read_back, metadata)
    if not isinstance(storage, LocalStorage):
        raise InvalidOption(f"{storage.info.location}: the format {to} is written to local paths only")
    path = Path(storage.info.location)
    if to == "dcp":
        from asyncdcp.interop.dcp_target import write_dcp

        return await write_dcp(reader, selection, path, read_back, allow_pickle=changes.allow_pickle)
    if to == "torch":
        return await write_torch(reader, selection, path, read_back, allow_pickle=changes.allow_pickle)
    return await write_huggingface(reader, selection, path, read_back, changes.shard_bytes)


async def _compare(reader: ReadableCheckpoint, selection: Selection, written: Written, path: str) -> None:
    """Reads everything back. What fails here is the fault of the disk, or of this program."""
    stored = select(reader.metadata, None, None, None)
    found = {tensor.name: tensor for tensor in stored.tensors}
    found |= {alias: found[name] for alias, name in stored.aliases.items()}
    wrong = [t.name for t in selection.tensors if t.name not in found or found[t.name][3:] != t[3:]]
    wrong += [name for name, value in selection.values.items() if not _is_value(stored.values.get(name), value)]
    if not wrong:
        names = [name for name in written if name in found]
        digests = Digests()
        async with read_ahead(reader, [whole_tensor(found[name]) for name in names], Trace()) as ahead:
            async for window in ahead:
                digests.add(window)
        wrong = [name for number, name in enumerate(names) if digests.found[number] != written[name]]
    if wrong:
        raise CorruptCheckpoint(f"{path} does not hold what was written to it: {', '.join(wrong[:5])}", path=path)


def _is_value(found: Any, written: Any) -> bool:
    """Whether tagged JSON is what was written. DCP's values that ``weights_only`` refuses come back as pickles."""
    return bool(found == written) or (isinstance(found, dict) and "pickle" in found)
