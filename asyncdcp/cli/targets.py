"""From what a person typed to a storage, with a way out for each wrong turn."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import ParamSpec, TypeVar

import anyio
import click
from click.shell_completion import CompletionItem

from asyncdcp.cli.text import one_line
from asyncdcp.errors import AsyncDCPError
from asyncdcp.storage import OBJECT_STORES, LocalStorage, Storage, open_storage
from asyncdcp.unwinding import ungrouped

PATIENCE = 10.0
"""Seconds without a word."""

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)

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
    """Runs a command's coroutine to its end. Where it takes long with an object store, that is said, and why: one that
    does not answer is asked for minutes, in silence.
    """
    given = [part for each in args for part in (each if isinstance(each, tuple) else (each,))]
    urls = [each for each in given if isinstance(each, str) and each.partition("://")[0] in OBJECT_STORES]
    return anyio.run(_patient, partial(function, *args, **kwargs), urls)


async def _patient(function: Callable[[], Awaitable[T]], urls: Sequence[str]) -> T:
    with ungrouped():
        async with anyio.create_task_group() as tasks:
            if urls:
                tasks.start_soon(_say_so, urls)
            result = await function()
            tasks.cancel_scope.cancel()
    return result


async def _say_so(urls: Sequence[str]) -> None:
    await anyio.sleep(PATIENCE)
    troubles = [trouble for url in urls if (trouble := await _trouble(url))]
    why = f"{troubles[0]}; it is asked again, for up to 3 minutes" if troubles else "the store answers, and takes long"
    with suppress(OSError):  # nobody reads it
        click.echo(f"asyncdcp: still at work with {', '.join(urls)}: {one_line(why)}", err=True)


async def _trouble(url: str) -> str | None:
    from asyncdcp.storage.object_store import ObjectStorage  # of an extra, which the command uses already

    try:
        return await ObjectStorage(url).trouble()
    except AsyncDCPError:  # the command says so
        return None


def open_storage_at(target: str) -> Storage:
    """The Storage at a path or URL. Something must be there."""
    if not target:
        raise click.ClickException("an empty path; give the folder of a checkpoint or of a run")
    storage = open_storage(target)
    if isinstance(storage, LocalStorage):
        _check_there(storage.info.location)
    return storage


def _check_there(path: str) -> None:
    try:
        os.stat(path)
        return
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        found = path
    while not os.path.lexists(found):
        found = os.path.dirname(found)
    if not os.path.exists(found):
        raise click.ClickException(f"{found} is a link to {os.readlink(found)}, which is not there")
    raise click.ClickException(f"there is no {path}; what there is of it is {found}")


def open_folder(target: str, what: str) -> Storage:
    """As ``open_storage_at``, for ``what`` cannot be a file."""
    storage = open_storage_at(target)
    if isinstance(storage, LocalStorage) and storage.is_file():
        folder = os.path.dirname(target) or "."
        raise click.ClickException(f"{target} is a file, and a {what} is a folder; try {folder}")
    return storage
