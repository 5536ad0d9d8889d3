"""``asyncdcp report``: a run as one HTML file that needs no network and nothing beside it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import click
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from asyncdcp.cli import report
from asyncdcp.cli.entries import entries_of
from asyncdcp.cli.opening import open_run
from asyncdcp.cli.output import say, written_whole
from asyncdcp.cli.report.content import Page, page_of
from asyncdcp.cli.targets import PLACE, run
from asyncdcp.cli.text import count_text, describe, shown, size_text
from asyncdcp.cli.tree import Leaf, Node, grow
from asyncdcp.errors import AsyncDCPError
from asyncdcp.pipeline.reader import CheckpointReader
from asyncdcp.runs import Run, read_history
from asyncdcp.storage import Place


@click.command()
@click.argument("place", metavar="RUN", type=PLACE)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    default="report.html",
    show_default=True,
    type=click.Path(dir_okay=False),
    help="Where the page goes; an old one is replaced. - for the standard output.",
)
def command(place: str, output: str) -> None:
    """Write a run as one HTML page: checkpoints, metrics, what saves cost and did when, and sizes.

    The page is one file that works offline. The stages of saves come from the history that a CheckpointManager writes.
    """
    page = run(_page, place)
    text = render(page)
    if output == "-":
        say(text)
        return
    html = text.encode()
    with written_whole(output) as file:
        file.write(html)
    say(f"{shown(output)}: {count_text(len(page.lines), 'checkpoint')}, {size_text(len(html))}")


async def _page(target: str) -> Page:
    place, found = await open_run(target)
    history = await read_history(place)
    return page_of(found, history, await _tensors(place, found), time.time())


async def _tensors(place: Place, found: Run) -> Sequence[Node]:
    """The tensors of the latest checkpoint; none where it cannot be opened, which the page can do without."""
    latest = found.known_latest()
    if latest is None:
        return ()
    try:
        async with await CheckpointReader.open(place.child(latest.name), data=False) as reader:
            entries = [entry for entry in entries_of(reader) if entry.is_tensor and entry.alias_of is None]
    except AsyncDCPError as error:
        click.echo(f"asyncdcp: no sizes of step {latest.step}: {describe(error)}", err=True)
        return ()
    return grow(
        (shown(each.name), Leaf(each.dtype, str(list(each.shape)), each.size, 1, "", is_tensor=True))
        for each in entries
    )


def render(page: Page) -> str:
    """The whole HTML file."""
    folder = os.path.dirname(report.__file__)
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("page.html.j2").render(page=page)
