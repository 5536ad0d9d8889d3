"""From what a person typed to an open checkpoint, or to a look at a run, with a way out for each wrong turn."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import click
from click.shell_completion import CompletionItem

from asyncdcp.cli.targets import open_folder, open_storage_at, run
from asyncdcp.cli.text import shown
from asyncdcp.errors import CheckpointNotFound, CorruptCheckpoint
from asyncdcp.metadata import Metadata, Record
from asyncdcp.names import record_save_id
from asyncdcp.pipeline import formats
from asyncdcp.pipeline.formats import ReadableCheckpoint, newest_foreign
from asyncdcp.pipeline.reader import CheckpointReader
from asyncdcp.pipeline.union import check_sizes
from asyncdcp.runs import Checkpoint, Run, look
from asyncdcp.runs.layout import step_of, term_of
from asyncdcp.storage import LocalStorage, Place, Storage, open_place


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


async def open_run(target: str) -> tuple[Place, Run]:
    """The place of a run and what is in it; an error if there is nothing of a run."""
    open_folder(target, "run")
    place = open_place(target)
    run = await look(place)
    if not run.checkpoints and not run.term:
        raise click.ClickException(_no_run(target, run) or await _foreign(place, target, run))
    return place, run


def note_of(checkpoint: Checkpoint) -> str:
    """What there is to say of one that is not simply there."""
    if checkpoint.state == "encrypted":
        return "cannot be read without its key"
    if checkpoint.cause is not None:
        return shown(checkpoint.cause)
    if checkpoint.state == "partial":
        return "under way, or cut off"
    return "" if checkpoint.on_line else "left behind by a rollback"


def _no_run(target: str, run: Run) -> str | None:
    if run.is_checkpoint():
        return f"{target} is a checkpoint, and no run; asyncdcp inspect {target} shows what is in it"
    inside = run.survey.children.items()
    runs = [name for name, found in inside if any(term_of(name) is not None for name in found.objects)]
    if runs:
        return f"{target} holds runs ({_shown(runs)}), and is none itself; such as: {os.path.join(target, min(runs))}"
    others = [name for name, found in inside if any(map(record_save_id, found.objects))]
    if others:
        return (
            f"{target} holds checkpoints ({_shown(others)}), but none named step_<number> as those of a run are; "
            f"to look into one: asyncdcp inspect {os.path.join(target, min(others))}"
        )
    return None


async def _foreign(place: Place, target: str, run: Run) -> str:
    """What to say where there is nothing of asyncdcp's: checkpoints of other formats are no run."""
    newest = await newest_foreign(place, run)
    if newest is not None:
        path = os.path.join(target, newest)
        return (
            f"{target} holds no run of asyncdcp's, but checkpoints of another format, such as {path}; "
            f"to look into one: asyncdcp inspect {path}"
        )
    return f"{target} holds no run: there is no folder step_<number> with a checkpoint in it"


def _shown(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (" …" if len(names) > 3 else "")
