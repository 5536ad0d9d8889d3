"""Which checkpoints of a run count: those on the line of its newest term.

Every writer that opens a run claims the next *term*, and writes down which steps of earlier terms it goes on from. So
the line of a run is, of each term on it, the steps up to a last one; of the newest term, all. A save of an earlier
term beyond that last step (one that a rollback left behind, or a late commit of a writer that was replaced) is off the
line: whole, but never the latest. Pure functions; nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from asyncdcp.runs.layout import LineStart, Segment

UNCLAIMED = 0
"""The term of checkpoints that no manager saved."""


class Line(msgspec.Struct, frozen=True):
    """The line of a run as of ``term``: per term, the last step on it; None for no limit. ``base`` is a save id."""

    term: int
    limits: Mapping[int, int | None]
    base: str | None = None

    def holds(self, term: int, step: int) -> bool:
        """Whether a checkpoint of this term and step is on the line."""
        if term not in self.limits:
            return False
        last = self.limits[term]
        return last is None or step <= last

    def going_on(self, term: int, base: tuple[str, int] | None) -> LineStart:
        """The line of a new term that goes on from ``base``, a checkpoint on this line (its save id and step).

        None for one that begins with nothing: no earlier checkpoint is on it.
        """
        if base is None:
            return LineStart(term, [])
        save_id, step = base
        segments = [
            Segment(number, step if last is None else min(step, last)) for number, last in sorted(self.limits.items())
        ]
        return LineStart(term, segments, save_id)


def current_line(starts: Sequence[LineStart], terms: Iterable[int]) -> Line:
    """The line of the newest start. Without any, of a run that no manager has opened, all ``terms`` are on it."""
    if not starts:
        return Line(UNCLAIMED, dict.fromkeys((UNCLAIMED, *terms), None))
    newest = max(starts, key=lambda start: start.term)
    limits: dict[int, int | None] = {segment.term: segment.last for segment in newest.segments}
    return Line(newest.term, {**limits, newest.term: None}, newest.base)
