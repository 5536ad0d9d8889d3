"""From what a person typed to an open checkpoint, with a way out for each wrong turn."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import click
from click.shell_completion import CompletionItem

from asyncdcp.cli.targets import open_storage_at, run
from asyncdcp.errors import CheckpointNotFound
from asyncdcp.metadata import Metadata, Record
from asyncdcp.names import record_save_id
from asyncdcp.pipeline import formats
from asyncdcp.pipeline.formats import ReadableCheckpoint
from asyncdcp.pipeline.reader import CheckpointReader
from asyncdcp.storage import LocalStorage, Storage

_LOOKED_AT = 1000
"""Folders in which checkpoints are looked for, for a hint."""


async def open_checkpoint(target: str) -> ReadableCheckpoint:
    """Opens a checkpoint of any format that is known; everything that describes it is checked."""
    storage = open_storage_at(target)
    try:
        return await formats.open_checkpoint(storage)
    except CheckpointNotFound as error:
        raise click.ClickException(f"{error}{await hint(storage)}") from error


@asynccontextmanager
async def opened(target: str) -> AsyncIterator[ReadableCheckpoint]:
    """``open_checkpoint``, closed at the end of the block."""
    reader = await open_checkpoint(target)
    try:
        yield reader
    finally:
        await reader.aclose()


def record_of(reader: ReadableCheckpoint) -> Record | None:
    """The Record of a checkpoint of asyncdcp's own format; None for another."""
    return reader.record if isinstance(reader, CheckpointReader) else None


async def hint(storage: Storage) -> str:
    """What there is at a place that holds no checkpoint, to be put behind the message that says so."""
    if isinstance(storage, LocalStorage) and storage.is_file():
        return ", which is a file of no known format; a checkpoint is a folder"
    names = await storage.list()
    if any(record_save_id(name) for name in names):
        return ""
    if any(name.endswith(".index.json") or ".safetensors" in name for name in names):
        return ": a save was cut off there, or is still under way"
    if isinstance(storage, LocalStorage) and (found := _checkpoints_below(storage.info.location)):
        return f", but in folders of it, such as {found}; to list them: asyncdcp ls {storage.info.location}"
    return "; a checkpoint is a folder with a file <save id>.json"


def _checkpoints_below(folder: str) -> str | None:
    """The last of the folders in it, by name, that has a Record."""
    with os.scandir(folder) as entries:
        folders = sorted((entry.path for entry in entries if entry.is_dir()), reverse=True)
    for path in folders[:_LOOKED_AT]:
        try:
            if any(map(record_save_id, os.listdir(path))):
                return path
        except OSError:
            continue
    return None


async def _metadata(target: str) -> Metadata:
    async with opened(target) as reader:
        return reader.metadata


def complete_entry(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The names in the checkpoint that was given before, for a shell. What goes wrong completes nothing."""
    try:
        metadata = run(_metadata, ctx.params.get("checkpoint") or ctx.params["a"])
    except Exception:  # noqa: BLE001  # a shell in the middle of a line must not see it
        return []
    names = (*metadata.state_dict_metadata, *metadata.aliases)
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
