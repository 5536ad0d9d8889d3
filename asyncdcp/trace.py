"""Spans: what a save or load did when. The pipeline records them, reports and progress are made from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Span(NamedTuple):
    """``stage`` ran on ``bytes`` bytes from ``start`` to ``end`` (seconds of ``time.monotonic``)."""

    stage: str
    start: float
    end: float
    bytes: int = 0


class Trace:
    """The spans of one save or load, in the order they ended. Threads may add at once (a list append is atomic).

    ``total`` is how many bytes there are to stage, or to read, once that is known.

    ``listener``, if given, is called with each span as it ends and ``total``, on the thread that ended it; it must not
    block.
    """

    def __init__(self, listener: Callable[[Span, int], None] | None = None) -> None:
        self.spans: list[Span] = []
        self.total = 0
        self._listener = listener

    @contextmanager
    def span(self, stage: str, nbytes: int = 0) -> Iterator[None]:
        """Records a span around the block, also where the block raises."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(Span(stage, start, time.monotonic(), nbytes))

    def add(self, span: Span) -> None:
        """Records a span that was measured elsewhere."""
        self.spans.append(span)
        if self._listener is not None:
            self._listener(span, self.total)

    def seconds(self) -> dict[str, float]:
        """Per stage, the time from its first span's start to its last one's end."""
        bounds: dict[str, tuple[float, float]] = {}
        for span in self.spans:
            start, end = bounds.get(span.stage, (span.start, span.end))
            bounds[span.stage] = (min(start, span.start), max(end, span.end))
        return {stage: end - start for stage, (start, end) in bounds.items()}

    def bytes(self) -> dict[str, int]:
        """Per stage, the bytes of its spans."""
        totals: dict[str, int] = {}
        for span in self.spans:
            totals[span.stage] = totals.get(span.stage, 0) + span.bytes
        return totals
