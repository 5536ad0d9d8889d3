"""A bar on stderr for what takes a while, where a person looks at it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import click

from asyncdcp.trace import Span, Trace

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
