"""What lies in a run's directory, by name, and the two small files by which writers take turns.

runs/gpt/
  step_100/            a checkpoint: see metadata.py
  term_2.json          claimed by the second writer, create-exclusively: from then on the first is fenced
  line_2.json          which checkpoints its line goes on from, written once that is known
  history.jsonl        a line for every committed save: metrics and timings, kept when the checkpoint is deleted
                       (encrypted where the save's metadata is)
  traces/              Chrome traces of saves, where they are asked for
"""

from __future__ import annotations

import re

import msgspec

from asyncdcp.envelope import decode_document, encode_document
from asyncdcp.errors import InvalidOption

HISTORY = "history.jsonl"
TRACES = "traces"

_STEP = re.compile(r"step_([0-9]+)", re.ASCII)
_TERM = re.compile(r"(term|line)_([1-9][0-9]*)\.json", re.ASCII)


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
