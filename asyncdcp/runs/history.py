"""A run's history: one line of JSON for every save that was committed, which outlives the checkpoint itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from asyncdcp.runs.layout import HISTORY
from asyncdcp.storage import Place
from asyncdcp.trace import Span

_LIMIT = 1 << 30


class StageTime(msgspec.Struct, frozen=True, array_like=True):
    """From the first begin to the last end of a stage, in seconds from the begin of the save; and its bytes."""

    begin: float
    end: float
    bytes: int = 0


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """A committed save. Times are in seconds; ``time`` since the epoch, the others from the call of ``save``.

    ``called_seconds`` is how long the call itself took, ``staged_seconds`` until the tensors could be changed again,
    ``durable_seconds`` until the checkpoint would have survived a loss of power, ``stage_seconds`` by stage,
    and ``stages`` when each of them was.
    """

    step: int
    term: int
    save_id: str
    time: float
    tensors: int = 0
    tensor_bytes: int = 0
    stored_bytes: int = 0
    called_seconds: float = 0.0
    staged_seconds: float = 0.0
    durable_seconds: float = 0.0
    stage_seconds: dict[str, float] = {}
    stages: dict[str, StageTime] = {}
    metrics: dict[str, float | None] = {}


def stage_times(spans: Sequence[Span]) -> dict[str, StageTime]:
    """The stages of a save, in the order in which they began."""
    origin = min((span.start for span in spans), default=0.0)
    found: dict[str, StageTime] = {}
    for span in sorted(spans, key=lambda span: span.start):
        begin, end = span.start - origin, span.end - origin
        known = found.get(span.stage, StageTime(begin, end))
        found[span.stage] = StageTime(known.begin, max(known.end, end), known.bytes + span.bytes)
    return found


async def append_history(place: Place, saved: Saved) -> None:
    """Adds a line."""
    await place.append(HISTORY, msgspec.json.encode(saved))


async def read_history(place: Place) -> list[Saved]:
    """All lines in the order they were written; those that cannot be read (a crash cuts one off) are passed over."""
    try:
        data = await place.storage.get(HISTORY, _LIMIT)
    except FileNotFoundError:
        return []
    return parse_history(data)


def parse_history(data: bytes) -> list[Saved]:
    """The lines of a history file, as ``read_history``."""
    found = []
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Saved)
    for line in data.splitlines():
        try:
            found.append(decoder.decode(line))
        except msgspec.MsgspecError:
            continue
    return found
