"""What people read: sizes, times and names as text, tables as wide as the terminal, and of an exception the one line
that says what is wrong, and the way out.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import click

from asyncdcp.errors import AsyncDCPError

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_LEAST = 12
"""A column that is cut keeps this many characters."""


def shown(text: str) -> str:
    """``text`` with escapes for what is not printable: a name out of a checkpoint must not steer a terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def size_text(size: int) -> str:
    """Bytes with three digits and a decimal unit: ``1.49 GB``."""
    value, unit = float(size), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    if unit == 0:
        return f"{size} B"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f} {_UNITS[unit]}"


def seconds_text(seconds: float) -> str:
    """A duration in the unit that suits it: ``2.4 ms``, ``1.20 s``, ``3 min 20 s``."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def time_text(seconds: float) -> str:
    """A time since the epoch in the local time zone, to the second; ``?`` for one that no calendar has."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "?"


def iso_text(seconds: float) -> str | None:
    """A time since the epoch as ISO 8601 in UTC, for JSON; None for one that no calendar has."""
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return None


def number_text(value: float | complex) -> str:
    """Four significant digits; whole numbers of up to nine as they are."""
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 1e9):
        return str(int(value))
    return f"{value:.4g}"


def count_text(count: int, what: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def dim(text: str) -> str:
    """In the background, where the terminal has colours."""
    return click.style(text, dim=True) if text else ""


def good(text: str) -> str:
    return click.style(text, fg="green")


def bad(text: str) -> str:
    return click.style(text, fg="red")


def warned(text: str) -> str:
    return click.style(text, fg="yellow")


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Column:
    """``right`` aligns numbers; ``cut`` lets it give way where the terminal is narrow. Empty columns are left out."""

    title: str
    right: bool = False
    cut: bool = False


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None = None) -> Iterator[str]:
    """The lines of a table, titles first. Cells may be styled. ``width`` defaults to the terminal's.

    A table library would cost more time than all else that a listing of 1,000 rows does.
    """
    if not rows:
        return
    kept = [n for n in range(len(columns)) if any(row[n] for row in rows)]
    plain = [[click.unstyle(row[n]) for n in kept] for row in rows]
    widths = [max(len(columns[n].title), *(len(row[at]) for row in plain)) for at, n in enumerate(kept)]
    _narrow([columns[n] for n in kept], widths, terminal_width() if width is None else width)
    titles = [columns[n].title.upper() for n in kept]
    yield dim(_line([columns[n] for n in kept], widths, titles, titles))
    for row, bare in zip(rows, plain, strict=True):
        yield _line([columns[n] for n in kept], widths, [row[n] for n in kept], bare)


def terminal_width() -> int:
    """The width of the terminal; a pipe or a file has no end."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def _narrow(columns: Sequence[Column], widths: list[int], limit: int) -> None:
    """Takes from the widest column that gives way, one character at a time, until the line fits."""
    excess = sum(widths) + 2 * (len(widths) - 1) - limit
    while excess > 0:
        soft = [n for n, column in enumerate(columns) if column.cut and widths[n] > _LEAST]
        if not soft:
            return
        widths[max(soft, key=lambda n: widths[n])] -= 1
        excess -= 1


def _line(columns: Sequence[Column], widths: Sequence[int], cells: Sequence[str], bare: Sequence[str]) -> str:
    parts = []
    for column, width, cell, text in zip(columns, widths, cells, bare, strict=True):
        if len(text) > width:
            parts.append(f"{text[: width - 1]}…")
            continue
        padding = " " * (width - len(text))
        parts.append(padding + cell if column.right else cell + padding)
    return "  ".join(parts).rstrip()


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def describe(error: BaseException) -> str:
    """One printable line, without the program's name."""
    if isinstance(error, BaseExceptionGroup):
        from asyncdcp.unwinding import first_error  # which imports anyio; --help does without

        error = first_error(error)
    return one_line(_message(error))


def one_line(text: str) -> str:
    """``text`` as one printable line."""
    return shown(" ".join(text.split()))


def _message(error: BaseException) -> str:
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{error.format_message()} (see {error.ctx.command_path} --help)"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, AsyncDCPError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        where = f": {error.filename}" if error.filename else ""
        return f"{os.strerror(error.errno)}{where}{_way_out(error.errno)}"
    if isinstance(error, MemoryError):
        return "there is not enough memory for this"
    kind = type(error).__name__
    return f"a bug in asyncdcp: {kind}: {error}; with ASYNCDCP_TRACEBACK=1 it shows where, please report it"


def _way_out(number: int) -> str:
    if number in (errno.EACCES, errno.EPERM):
        return "; you need the right to read it"
    return ""
