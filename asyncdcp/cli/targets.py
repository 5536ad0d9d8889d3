"""From what a person typed to a storage, with a way out for each wrong turn."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import ParamSpec, TypeVar

import anyio
import click
from click.shell_completion import CompletionItem

from asyncdcp.storage import OBJECT_STORES, LocalStorage, Storage, open_storage
from asyncdcp.unwinding import ungrouped

PATIENCE = 10.0
"""Seconds without a word."""

P = ParamSpec("P")
T = TypeVar("T")


class PlaceType(click.ParamType[str]):
    """A folder or a URL; shells complete folders."""

    name = "place"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


PLACE = PlaceType()
AS_JSON = click.option("--json", "as_json", is_flag=True, help="JSON for programs.")
"""The option of every command that prints a table."""


def run(function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs a command's coroutine to its end. Where it takes long with an object store, that is said: one that does not
    answer is asked for minutes, in silence.
    """
    given = [part for each in args for part in (each if isinstance(each, tuple) else (each,))]
    url = next((each for each in given if isinstance(each, str) and each.partition("://")[0] in OBJECT_STORES), None)
    return anyio.run(_patient, partial(function, *args, **kwargs), url)


async def _patient(function: Callable[[], Awaitable[T]], url: str | None) -> T:
    with ungrouped():
        async with anyio.create_task_group() as tasks:
            if url is not None:
                tasks.start_soon(_say_so, url)
            result = await function()
            tasks.cancel_scope.cancel()
    return result


async def _say_so(url: str) -> None:
    await anyio.sleep(PATIENCE)
    with suppress(OSError):  # nobody reads it
        click.echo(
            f"still at work with {url}: a store that does not answer is asked again, for up to 3 minutes", err=True
        )


def open_storage_at(target: str) -> Storage:
    """The Storage at a path or URL. Something must be there."""
    if not target:
        raise click.ClickException("an empty path; give the folder of a checkpoint or of a run")
    storage = open_storage(target)
    if isinstance(storage, LocalStorage) and not os.path.lexists(path := storage.info.location):
        parent = os.path.dirname(path)
        while not os.path.isdir(parent):
            parent = os.path.dirname(parent)
        raise click.ClickException(f"there is no {path}; what there is of it is {parent}")
    return storage


def open_folder(target: str, what: str) -> Storage:
    """As ``open_storage_at``, for ``what`` cannot be a file."""
    storage = open_storage_at(target)
    if isinstance(storage, LocalStorage) and storage.is_file():
        folder = os.path.dirname(target) or "."
        raise click.ClickException(f"{target} is a file, and a {what} is a folder; try {folder}")
    return storage
