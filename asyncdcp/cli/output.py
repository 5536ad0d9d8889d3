"""How a command answers: lines and JSON on stdout, a bar on stderr, files whole or as before, and exit statuses."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import click
import msgspec

from asyncdcp.errors import plain, with_way_out
from asyncdcp.trace import Span, Trace

DIFFERENT = 1
"""The exit status of a "no": damaged, different."""
TROUBLE = 2
"""The exit status of what could not be carried out."""


class ReaderGone(Exception):
    """Who read the output went away. Not an OSError, which click would take for an exit status of its own."""


def say(lines: Sequence[str] | Iterator[str] | str) -> None:
    """Prints lines; without colours where they do not belong."""
    try:
        click.echo(lines if isinstance(lines, str) else "\n".join(lines))
    except BrokenPipeError as error:
        raise ReaderGone from error


def say_json(content: Any) -> None:
    """Prints JSON, indented; what is not finite is null, and of a path what is not UTF-8 an escape."""
    try:
        encoded = msgspec.json.encode(content)
    except UnicodeEncodeError:
        encoded = msgspec.json.encode(_encodable(content))
    say(msgspec.json.format(encoded, indent=2).decode())


def _encodable(content: Any) -> Any:
    if isinstance(content, str):
        return plain(content)
    if isinstance(content, dict):
        return {key: _encodable(value) for key, value in content.items()}
    return [_encodable(value) for value in content] if isinstance(content, list | tuple) else content


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def written_whole(path: str) -> Iterator[BinaryIO]:
    """A file to write to, which becomes ``path`` where the block ends well, and is gone where it does not.

    A link stays, and what it leads to is replaced. A pipe or a device, such as /dev/stdout, is written to as it is: a
    rename would put a file in its place.
    """
    folder = os.path.dirname(path)
    if folder and not os.path.isdir(folder):
        raise click.ClickException(f"{path} cannot be written: there is no folder {folder}")
    special = os.path.exists(path) and not os.path.isfile(path)
    try:
        with open(path, "wb") if special else _replacing(os.path.realpath(path)) as file:
            yield file
    except BrokenPipeError as error:
        raise ReaderGone from error
    except OSError as error:
        raise click.ClickException(
            with_way_out(f"{path} cannot be written: {error.strerror or error}", error.errno)
        ) from error


@contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    partial = f"{path}.{os.urandom(4).hex()}.partial"
    try:
        with open(partial, "xb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise


# ── progress ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_WORTH_SHOWING = 64 << 20
"""Below so many bytes it is done before a bar is seen."""


@contextmanager
def shown_progress(label: str, total: int | None) -> Iterator[Trace]:
    """A trace whose verified bytes fill a bar up to ``total``, or the trace's own total; none in a pipe."""
    if not sys.stderr.isatty():
        yield Trace()
        return
    bar = _Bar(label, total)
    try:
        yield Trace(bar.listen)
    finally:
        bar.close()


class _Bar:
    """Begins with the first bytes, and only where there are many to come."""

    def __init__(self, label: str, total: int | None) -> None:
        self._label = label
        self._total = total
        self._lock = threading.Lock()
        self._bar: click._termui_impl.ProgressBar[int] | None = None

    def listen(self, span: Span, total: int) -> None:
        """A trace's listener, called on any thread."""
        expected = total if self._total is None else self._total
        if span.stage != "verify" or expected < _WORTH_SHOWING:
            return
        with self._lock:
            if self._bar is None:
                self._bar = click.progressbar(length=expected, label=self._label, file=sys.stderr)
                self._bar.__enter__()
            self._bar.update(span.bytes)

    def close(self) -> None:
        """Ends the line."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
