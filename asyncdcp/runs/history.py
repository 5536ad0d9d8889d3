"""A run's history: one line of JSON for every save that was committed, which outlives the checkpoint itself.

Where the save's metadata is hidden its line is, too: encrypted with the same key, bound to the save.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from anyio import to_thread

from asyncdcp.envelope import Seal, Unseal
from asyncdcp.errors import CorruptCheckpoint, KeyUnavailable, MissingDependency
from asyncdcp.extensions import PLAIN, Chain, ExtensionRegistry, Seals
from asyncdcp.runs.layout import HISTORY
from asyncdcp.storage import Place
from asyncdcp.trace import Span

_LIMIT = 1 << 30
_DAMAGED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class StageTime(msgspec.Struct, frozen=True, array_like=True):
    """From the first begin to the last end of a stage, in seconds from the begin of the save; and its bytes."""

    begin: float
    end: float
    bytes: int = 0


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """A committed save. Tensors and bytes are those of all ranks; times are rank 0's, in seconds, ``time`` since the
    epoch, the others from the call of ``save``.

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


class History(NamedTuple):
    """The saves that can be read, in the order they were written, and how many are encrypted and cannot be opened: with
    a key that is not at hand, or damaged.
    """

    saves: list[Saved]
    sealed: int = 0


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The line of a save with hidden metadata: the seal of ``body``, which is a ``Saved``, encrypted."""

    save_id: str
    seal: Seal
    body: bytes


def stage_times(spans: Sequence[Span]) -> dict[str, StageTime]:
    """The stages of a save, in the order in which they began."""
    origin = min((span.start for span in spans), default=0.0)
    found: dict[str, StageTime] = {}
    for span in sorted(spans, key=lambda span: span.start):
        begin, end = span.start - origin, span.end - origin
        known = found.get(span.stage, StageTime(begin, end))
        found[span.stage] = StageTime(known.begin, max(known.end, end), known.bytes + span.bytes)
    return found


async def append_history(place: Place, saved: Saved, chain: Chain = PLAIN) -> None:
    """Adds a line; encrypted where ``chain``, which the save was made with, hides its metadata. One call is to be
    awaited before the next, so that lines come in order.
    """
    await place.append(HISTORY, await to_thread.run_sync(_line, saved, chain))  # it may ask for a key


def _line(saved: Saved, chain: Chain) -> bytes:
    line, sealer = msgspec.json.encode(saved), chain.sealer(saved.save_id)
    if sealer is None:
        return line
    seal, body = sealer(line, _bound_to(saved.save_id))
    return msgspec.json.encode(_Sealed(saved.save_id, seal, body)) if seal.hidden else line


async def read_history(place: Place, registry: ExtensionRegistry | None = None) -> list[Saved]:
    """All lines in the order they were written; those that cannot be read (cut off by a crash, damaged, or the key is
    not there) are passed over. ``registry`` has the keys, by default those of the environment.
    """
    return (await open_history(place, registry)).saves


async def open_history(place: Place, registry: ExtensionRegistry | None = None) -> History:
    """As ``read_history``, with how many of the lines are encrypted and stay so."""
    try:
        data = await place.storage.get(HISTORY, _LIMIT)
    except FileNotFoundError:
        return History([])
    return await to_thread.run_sync(_parsed, data, Seals(registry or ExtensionRegistry()))  # it may ask for a key


def _parsed(data: bytes, unseal: Unseal) -> History:
    """The lines of a history file."""
    found, sealed = list[Saved](), 0
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Saved)
    for line in data.splitlines():
        try:
            found.append(decoder.decode(_opened(line, unseal)))
        except _DAMAGED:
            continue
        except (CorruptCheckpoint, KeyUnavailable, MissingDependency):
            sealed += 1
    return History(found, sealed)


def _opened(line: bytes, unseal: Unseal) -> bytes:
    try:
        hidden = msgspec.json.decode(line, type=_Sealed)
    except _DAMAGED:  # in clear, or not a line at all
        return line
    return unseal(hidden.seal, hidden.body, _bound_to(hidden.save_id))


def _bound_to(save_id: str) -> str:
    """The name that a line is sealed under, like the names of the save's files."""
    return f"{save_id}.history"
