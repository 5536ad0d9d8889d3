"""``asyncdcp cat``: one tensor as text or as a .npy file, or one plain value."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, BinaryIO

import click

from asyncdcp.cli.entries import Entry, entries_of, no_such_name, plain_text
from asyncdcp.cli.opening import complete_entry, opened
from asyncdcp.cli.output import ReaderGone, say, say_json, written_whole
from asyncdcp.cli.targets import PLACE, run
from asyncdcp.cli.text import shown
from asyncdcp.pipeline.formats import ReadableCheckpoint

if TYPE_CHECKING:
    from asyncdcp.cli.reading import Array

_TEXT_LIMIT = 1 << 20
"""So many characters of a plain value are printed."""
_PART = 1000
"""A tensor of more elements is abridged; with --all it is printed so many at a time."""


@click.command()
@click.argument("checkpoint", metavar="CKPT", type=PLACE)
@click.argument("name", metavar="NAME", shell_complete=complete_entry)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Write a .npy file; - for the standard output.",
)
@click.option("-a", "--all", "everything", is_flag=True, help="Print every element, however many there are.")
@click.option("--json", "as_json", is_flag=True, help="JSON for programs: nested lists, or the tagged value.")
def command(checkpoint: str, name: str, output: str | None, *, everything: bool, as_json: bool) -> None:
    """Print one tensor or plain value, or write the tensor to a .npy file.

    Every byte is verified. What numpy has no dtype for (bfloat16, 8-bit floats) is widened to float32, exactly.
    """
    if output is not None and as_json:
        raise click.UsageError("--output writes .npy, --json prints; give one of them")
    run(_cat, checkpoint, name, output, everything=everything, as_json=as_json)


async def _cat(checkpoint: str, name: str, output: str | None, *, everything: bool, as_json: bool) -> None:
    async with opened(checkpoint) as reader:
        entries = {entry.name: entry for entry in entries_of(reader)}
        if name not in entries:
            raise click.ClickException(no_such_name(name, [*entries]))
        entry = entries[name]
        if not entry.is_tensor:
            _value(entry, output, as_json=as_json)
            return
        array = await _read(reader, entry)
    if output is not None:
        _write(array, output)
        if output != "-":
            click.echo(f"{shown(output)}: {array.dtype} {list(array.shape)}{_note(entry)}", err=True)
    elif as_json:
        say_json(_nested(array))
    else:
        for line in _text(entry, array, everything=everything):
            say(line)


def _value(entry: Entry, output: str | None, *, as_json: bool) -> None:
    if output is not None:
        raise click.ClickException(f"{entry.name} is a plain value and no tensor; print it without --output")
    if as_json:
        say_json(entry.value)
    else:
        say(plain_text(entry.value, _TEXT_LIMIT))


async def _read(reader: ReadableCheckpoint, entry: Entry) -> Array:
    """The whole tensor, in numpy's terms."""
    from asyncdcp.boxes import whole
    from asyncdcp.cli.output import shown_progress
    from asyncdcp.cli.reading import Piece, numbers, read_pieces

    with shown_progress("reading", entry.size) as trace:
        (stored,) = await read_pieces(reader, [Piece(entry.stored_name, whole(entry.shape))], trace)
    return numbers(stored, entry.dtype)


def _note(entry: Entry) -> str:
    from asyncdcp.cli.reading import is_number, is_widened

    if is_widened(entry.dtype):
        return f", widened from {entry.dtype}"
    return "" if is_number(entry.dtype) else f", the stored bytes of {entry.dtype}"


def _text(entry: Entry, array: Array, *, everything: bool) -> Iterator[str]:
    yield f"{shown(entry.name)}  {entry.dtype} {list(entry.shape)}"
    if everything and array.size > _PART:
        yield from _every_line(array)
    else:
        yield _part_text(array)


def _part_text(array: Array) -> str:
    import numpy as np

    return np.array2string(array, threshold=_PART, max_line_width=100, separator=" ")


def _every_line(array: Array) -> Iterator[str]:
    """As numpy prints it, part by part: for all of it, numpy's time grows with the square of the length."""
    row = array.size // len(array)
    if row > _PART:
        parts: Iterable[Iterable[str]] = map(_every_line, array)
    else:
        step = _PART // row
        texts = (_part_text(array[n : n + step])[1:-1] for n in range(0, len(array), step))
        parts = ([line.removeprefix(" ") for line in text.split("\n") if line] for text in texts)
    before = None
    for line in chain.from_iterable(parts):
        if before is not None:
            yield before
        before = f"{'[' if before is None else ' '}{line}"
    yield f"{before}]"


def _nested(array: Array) -> object:
    if array.dtype.kind == "c":
        array = array.view(array.real.dtype).reshape(*array.shape, 2)
    return array.tolist()


def _write(array: Array, output: str) -> None:
    if output == "-":
        if sys.stdout.isatty():
            raise click.ClickException("a .npy file is no text for a terminal; redirect it, or leave --output away")
        try:
            _save(sys.stdout.buffer, array)
        except BrokenPipeError as error:
            raise ReaderGone from error
        return
    with written_whole(output) as file:
        _save(file, array)


def _save(file: BinaryIO, array: Array) -> None:
    from numpy.lib import format as npy  # its own write_array puts no errno into the error of a full disk or a pipe

    data = array if array.flags.c_contiguous else array.copy()
    npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(data))
    file.write(data.reshape(-1).view("u1").data)
    file.flush()
