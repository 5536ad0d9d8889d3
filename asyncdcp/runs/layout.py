"""What lies in a run's directory, by name; the two small files by which writers take turns; and by these, which
checkpoints count. Pure functions; nothing here does I/O.

runs/gpt/
  step_100/            a checkpoint: see metadata.py
  term_2.json          claimed by the second writer, create-exclusively: from then on the first is fenced
  line_2.json          which checkpoints its line goes on from, written once that is known
  history.jsonl        a line for every committed save: metrics and timings, kept when the checkpoint is deleted
                       (encrypted where the save's metadata is)
  traces/              Chrome traces of saves, where they are asked for

Every writer that opens a run claims the next *term*, and writes down which steps of earlier terms it goes on from. So
the line of a run is, of each term on it, the steps up to a last one; of the newest term, all. A save of an earlier
term beyond that last step (one that a rollback left behind, or a late commit of a writer that was replaced) is off the
line: whole, but never the latest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from asyncdcp.envelope import decode_document, encode_document
from asyncdcp.errors import InvalidOption

HISTORY = "history.jsonl"
TRACES = "traces"

_STEP = re.compile(r"step_([0-9]+)", re.ASCII)
_TERM = re.compile(r"(term|line)_([1-9][0-9]*)\.json", re.ASCII)
UNCLAIMED = 0
"""The term of checkpoints that no manager saved."""


class TermClaim(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who writes in a term, for people; that it exists is what counts."""

    term: int
    time: float
    host: str
    pid: int


class Segment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of ``term``, the steps up to ``last`` are on the line."""

    term: int
    last: int


class LineStart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the line of ``term`` goes on from: ``base`` is the save id of the checkpoint, None for a new run."""

    term: int
    segments: list[Segment]
    base: str | None = None


def check_step(step: object) -> int:
    """The step itself if it is one, else ``InvalidOption``."""
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        way_out = "; int() makes one of it" if hasattr(step, "__index__") and not isinstance(step, int) else ""
        raise InvalidOption(f"a step is a whole number from 0 up, not {step!r:.80}{way_out}")
    return step


def step_name(step: int) -> str:
    """The name of a step's sub-place."""
    return f"step_{check_step(step)}"


def step_of(name: str) -> int | None:
    """The step of a sub-place's name, leading zeros or not; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def term_name(term: int) -> str:
    """The claim of a term."""
    return f"term_{term}.json"


def line_name(term: int) -> str:
    """Where a term's line goes on from."""
    return f"line_{term}.json"


def term_of(name: str) -> int | None:
    """The term that a claim's name claims; None for any other name."""
    match = _TERM.fullmatch(name)
    return int(match[2]) if match and match[1] == "term" else None


def line_term_of(name: str) -> int | None:
    """The term of a line's name; None for any other name."""
    match = _TERM.fullmatch(name)
    return int(match[2]) if match and match[1] == "line" else None


def encode_claim(claim: TermClaim) -> bytes:
    """The bytes of a term's claim."""
    return encode_document("term", claim)


def encode_line(start: LineStart) -> bytes:
    """The bytes of a line's file."""
    return encode_document("line", start)


def decode_line(data: bytes, name: str) -> LineStart:
    """A line's start; ``CorruptCheckpoint`` naming ``name`` otherwise."""
    return decode_document("line", LineStart, data, name)


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
