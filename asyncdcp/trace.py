"""Spans: what a save or load did when. The pipeline records them, reports and progress are made from them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
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


def chrome_trace(spans: Sequence[Span], name: str) -> bytes:
    """The spans in Chrome's trace event format (JSON), which Perfetto and chrome://tracing open.

    A track for each stage, and further ones for what ran in it at the same time; times are from the first span's start.
    The format: "Trace Event Format", complete events (``"ph": "X"``) and names of tracks (``"ph": "M"``).
    """
    first = min((span.start for span in spans), default=0.0)
    events: list[dict[str, object]] = [_named("process_name", 0, name)]
    ends: list[float] = []
    rows: dict[str, list[int]] = {}
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        tracks = rows.setdefault(span.stage, [])
        track = next((number for number in tracks if ends[number] <= span.start), None)
        if track is None:
            track = len(ends)
            tracks.append(track)
            ends.append(0.0)
            events.append(_named("thread_name", track, span.stage))
        ends[track] = span.end
        begun, lasted = round((span.start - first) * 1e6, 1), round((span.end - span.start) * 1e6, 1)
        event = {"ph": "X", "name": span.stage, "cat": "save", "pid": 0, "tid": track, "ts": begun, "dur": lasted}
        events.append({**event, "args": {"bytes": span.bytes}})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode()


def _named(kind: str, track: int, name: str) -> dict[str, object]:
    return {"ph": "M", "name": kind, "pid": 0, "tid": track, "args": {"name": name}}
