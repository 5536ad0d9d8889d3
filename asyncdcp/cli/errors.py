"""From an exception to the one line that a person reads: what is wrong, and the way out."""

from __future__ import annotations

import errno
import os

import click

from asyncdcp.cli.text import shown
from asyncdcp.errors import AsyncDCPError
from asyncdcp.unwinding import first_error

DIFFERENT = 1
"""The exit status of a "no": damaged, different."""
TROUBLE = 2
"""The exit status of what could not be carried out."""


def describe(error: BaseException) -> str:
    """One printable line, without the program's name."""
    if isinstance(error, BaseExceptionGroup):
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
