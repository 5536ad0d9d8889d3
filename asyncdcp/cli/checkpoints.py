"""From what a person typed to an open checkpoint, with a way out for each wrong turn."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import click
from click.shell_completion import CompletionItem

from asyncdcp.cli.targets import open_storage_at, run
from asyncdcp.errors import CheckpointNotFound, CorruptCheckpoint
from asyncdcp.metadata import Metadata, Record
from asyncdcp.names import record_save_id
from asyncdcp.pipeline import formats
from asyncdcp.pipeline.formats import ReadableCheckpoint
from asyncdcp.pipeline.reader import CheckpointReader
from asyncdcp.pipeline.union import check_sizes
from asyncdcp.runs.layout import step_of
from asyncdcp.storage import LocalStorage, Storage, open_place


async def open_checkpoint(target: str, *, data: bool = True) -> ReadableCheckpoint:
    """Opens a checkpoint of any format that is known; everything that describes it is checked. ``data=False`` is for
    who reads no tensor: its data files may be gone, and an encrypted checkpoint needs no key, unless its names are
    encrypted too.
    """
    storage = open_storage_at(target)
    try:
        return await formats.open_checkpoint(storage, data=data)
    except CheckpointNotFound as error:
        raise click.ClickException(f"{error}{await hint(target, storage)}") from error


@asynccontextmanager
async def opened(target: str, *, data: bool = True) -> AsyncIterator[ReadableCheckpoint]:
    """``open_checkpoint``, closed at the end of the block."""
    reader = await open_checkpoint(target, data=data)
    try:
        yield reader
    finally:
        await reader.aclose()


def record_of(reader: ReadableCheckpoint) -> Record | None:
    """The Record of a checkpoint of asyncdcp's own format; None for another."""
    return reader.record if isinstance(reader, CheckpointReader) else None


async def damage_of(target: str, reader: ReadableCheckpoint) -> str | None:
    """What of an open checkpoint's data files is missing, or too short; None where none is, or nobody can tell."""
    if isinstance(reader, CheckpointReader):
        try:
            check_sizes(reader.files, await open_storage_at(target).list())
        except CorruptCheckpoint as error:
            return str(error)
    return None


async def hint(target: str, storage: Storage) -> str:
    """What there is at a place that holds no checkpoint, to be put behind the message that says so."""
    if isinstance(storage, LocalStorage) and storage.is_file():
        return ", which is a file of no known format; a checkpoint is a folder"
    names = await storage.list()
    if any(record_save_id(name) for name in names):
        return ""
    if any(name.endswith(".index.json") or ".safetensors" in name for name in names):
        return ": a save was cut off there, or is still under way"
    below = await _checkpoints_below(target)
    if below:
        return f", but in folders of it, such as {os.path.join(target, below)}; to list them: asyncdcp ls {target}"
    return "; a checkpoint is a folder with a file <save id>.json"


async def _checkpoints_below(target: str) -> str | None:
    """The folder of the last step of a run, or else the last folder that has a Record."""
    survey = await open_place(target).survey(lambda child, name: False, 0)
    found = [name for name, contents in survey.children.items() if any(map(record_save_id, contents.objects))]
    return max(found, key=lambda name: (step_of(name) or -1, name), default=None)


async def _metadata(target: str) -> Metadata:
    async with opened(target, data=False) as reader:
        return reader.metadata


def complete_entry(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The names in the checkpoint that was given before, for a shell. What goes wrong completes nothing."""
    try:
        metadata = run(_metadata, ctx.params.get("checkpoint") or ctx.params["a"])
    except Exception:  # noqa: BLE001  # a shell in the middle of a line must not see it
        return []
    names = (*metadata.state_dict_metadata, *metadata.aliases)
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
