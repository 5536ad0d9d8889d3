"""What the trainer and the worker say to each other, in which frames, and what may happen when. No I/O.

    trainer → worker   Configure; then any of ShareArena, DropArena, Begin, Slab, Staged, Stop, Inspect; at last Leave
    worker → trainer   Ready; then any of Freed, Spans, Logged, Done, Failed, Inspection

A frame is its length (8 bytes, little-endian) and one message as JSON: a job carries parts of an Index, which are
JSON already and are not encoded again. A ``ShareArena`` comes with one file descriptor, sent with its first byte.
"""

from __future__ import annotations

import signal
import struct
from collections.abc import Iterator, Mapping
from enum import Enum, auto
from types import MappingProxyType
from typing import Any, Final, Generic, TypeAlias, TypeVar

import msgspec

from asyncdcp.extensions import ExtensionSpec
from asyncdcp.pipeline.messages import Saved, SaveJob, SlabReady
from asyncdcp.storage.spec import StorageSpec

VERSION: Final = 1
FRAME_LIMIT: Final = 4 << 30
IGNORED: Final = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What a terminal, a scheduler or a launcher sends to everything at once, when training is to end. The worker drains
what was staged, and ends when its trainer has."""
_LENGTH: Final = struct.Struct("<Q")


class ErrorFrame(msgspec.Struct, frozen=True):
    """An error as plain data: the name of its class in ``asyncdcp.errors`` (or "OSError"), message and fields."""

    kind: str
    message: str
    fields: dict[str, Any]
    traceback: str = ""
    cause: ErrorFrame | None = None


# ── trainer → worker ────────────────────────────────────────────────────────────────────────────────────────────────


class Configure(msgspec.Struct, frozen=True, tag=True):
    """The first message. Priorities as in ``Options``; ``log_level`` is what the trainer's logging lets through."""

    version: int
    nice: int
    io_priority: str | int | None
    affinity: list[int] | None
    log_level: int


class ShareArena(msgspec.Struct, frozen=True, tag=True):
    """An arena by the number that ``Begin`` calls it by; its memfd comes with this message."""

    arena: int
    slots: int
    slot_bytes: int


class DropArena(msgspec.Struct, frozen=True, tag=True):
    """No save will use this arena again."""

    arena: int


class Begin(msgspec.Struct, frozen=True, tag=True):
    """A save. The worker carries out one after another, in the order of these messages. ``extensions`` hold what they
    need, secrets too.
    """

    arena: int
    storage: StorageSpec
    job: SaveJob
    extensions: list[ExtensionSpec] = []


class Slab(msgspec.Struct, frozen=True, tag=True):
    """A slab of ``save`` is staged. Its slot is the worker's until ``Freed``."""

    save: str
    slab: SlabReady


class Staged(msgspec.Struct, frozen=True, tag=True):
    """All slabs of ``save`` were announced: from here on the worker commits it even if the trainer dies."""

    save: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """The trainer gives ``save`` up, if that is still possible; the answer is ``Done`` or ``Failed`` all the same."""

    save: str
    kind: str
    error: ErrorFrame


class Inspect(msgspec.Struct, frozen=True, tag=True):
    """Asks for an ``Inspection``."""


class Leave(msgspec.Struct, frozen=True, tag=True):
    """The worker is to exit once its saves are settled."""


ToWorker: TypeAlias = Configure | ShareArena | DropArena | Begin | Slab | Staged | Stop | Inspect | Leave


# ── worker → trainer ────────────────────────────────────────────────────────────────────────────────────────────────


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The worker is configured and takes saves."""

    version: int
    pid: int


class Freed(msgspec.Struct, frozen=True, tag=True):
    """A slot is not used by ``save`` any more."""

    save: str
    slot: int


class Spans(msgspec.Struct, frozen=True, tag=True):
    """Spans of ``save`` that ended, several at a time; (stage, start, end, bytes) as in ``trace.Span``."""

    save: str
    spans: list[tuple[str, float, float, int]]


class Logged(msgspec.Struct, frozen=True, tag=True):
    """A log record; the traceback, if any, is part of the message."""

    logger: str
    level: int
    message: str
    created: float


class Done(msgspec.Struct, frozen=True, tag=True):
    """``save`` is committed and durable; the worker uses none of its slots any more."""

    save: str
    saved: Saved


class Failed(msgspec.Struct, frozen=True, tag=True):
    """``save`` is settled without a commit, or ``CommitUnknown``; the worker uses none of its slots any more."""

    save: str
    error: ErrorFrame


class Inspection(msgspec.Struct, frozen=True, tag=True):
    """The worker about itself. ``rss_bytes`` is resident memory without the shared memory of arenas."""

    pid: int
    modules: list[str]
    rss_bytes: int
    descriptors: int
    threads: int
    arenas: int
    saves: int
    nice: int


ToTrainer: TypeAlias = Ready | Freed | Spans | Logged | Done | Failed | Inspection


# ── frames ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class ProtocolError(RuntimeError):
    """The other side said what it may not say: a bug in asyncdcp, or two versions of it."""


T = TypeVar("T")


def encode(message: ToWorker | ToTrainer) -> bytes:
    """The frame of a message."""
    body = msgspec.json.encode(message)
    return _LENGTH.pack(len(body)) + body


class Framer(Generic[T]):
    """Cuts a stream of bytes into messages of ``type_`` (a union of message types)."""

    def __init__(self, type_: Any) -> None:
        self._decoder: msgspec.json.Decoder[T] = msgspec.json.Decoder(type_)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[T]:
        """The messages that are complete with ``data``. ``ProtocolError`` for what is none."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > FRAME_LIMIT:
                raise ProtocolError(f"a message of {length} bytes")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(memoryview(self._buffer)[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                message = self._decoder.decode(body)
            except msgspec.MsgspecError as error:
                raise ProtocolError(f"not a message: {error}") from error
            yield message


# ── what may happen when ────────────────────────────────────────────────────────────────────────────────────────────


class SaveState(Enum):
    """Where a save stands on the wire; trainer and worker each keep one of their own."""

    NEW = auto()
    STAGING = auto()
    """Begun; slabs come."""
    STAGED = auto()
    """All slabs were announced. The worker needs the trainer no more."""
    STOPPING = auto()
    """Given up; the worker has not answered yet."""
    SETTLED = auto()
    """The worker has answered: ``Done`` or ``Failed``."""
    ORPHANED = auto()
    """The other side died. The trainer finds out what became of the save; a worker gives it up."""
    FENCED = auto()
    """The worker neither answers nor could be seen to die: the Record decides, and its memory is never used again."""


class SaveEvent(Enum):
    """What happened to a save, by message or otherwise."""

    BEGIN = auto()
    SLAB = auto()
    STAGED = auto()
    STOP = auto()
    NEWS = auto()
    """``Freed`` or ``Spans``."""
    ANSWER = auto()
    DIED = auto()
    """The other side's death is confirmed."""
    SILENT = auto()
    """The worker did not answer in time, nor did it die when killed."""


_S, _E = SaveState, SaveEvent

SAVE_TRANSITIONS: Final[Mapping[tuple[SaveState, SaveEvent], SaveState]] = MappingProxyType(
    {
        (_S.NEW, _E.BEGIN): _S.STAGING,
        (_S.STAGING, _E.SLAB): _S.STAGING,
        (_S.STAGING, _E.STAGED): _S.STAGED,
        (_S.STAGING, _E.STOP): _S.STOPPING,
        (_S.STAGED, _E.STOP): _S.STOPPING,
        # Staging goes on for a moment after a save was given up.
        (_S.STOPPING, _E.SLAB): _S.STOPPING,
        (_S.STOPPING, _E.STAGED): _S.STOPPING,
        (_S.STOPPING, _E.STOP): _S.STOPPING,
        # Messages of both sides cross: the worker settles while these are on their way.
        (_S.SETTLED, _E.SLAB): _S.SETTLED,
        (_S.SETTLED, _E.STAGED): _S.SETTLED,
        (_S.SETTLED, _E.STOP): _S.SETTLED,
        **{(state, _E.NEWS): state for state in (_S.STAGING, _S.STAGED, _S.STOPPING, _S.ORPHANED)},
        **{(state, _E.ANSWER): _S.SETTLED for state in (_S.STAGING, _S.STAGED, _S.STOPPING, _S.ORPHANED)},
        **{(state, _E.DIED): _S.ORPHANED for state in (_S.STAGING, _S.STOPPING)},
        # What was staged is the worker's to finish; so for a worker this is no event in STAGED (see `Job`).
        (_S.STAGED, _E.DIED): _S.ORPHANED,
        **{(state, _E.SILENT): _S.FENCED for state in (_S.STAGING, _S.STAGED, _S.STOPPING)},
    }
)


class WorkerState(Enum):
    """Where a worker process stands, as the trainer sees it."""

    STARTING = auto()
    READY = auto()
    LEAVING = auto()
    """It was asked to exit."""
    KILLED = auto()
    """SIGKILL was sent; its death is not seen yet."""
    DEAD = auto()
    """Its pidfd says so: nothing of it runs, and nothing ever will."""


class WorkerEvent(Enum):
    """What happened to a worker process."""

    READY = auto()
    LEAVE = auto()
    KILL = auto()
    DIED = auto()


_W, _V = WorkerState, WorkerEvent

WORKER_TRANSITIONS: Final[Mapping[tuple[WorkerState, WorkerEvent], WorkerState]] = MappingProxyType(
    {
        (_W.STARTING, _V.READY): _W.READY,
        (_W.READY, _V.LEAVE): _W.LEAVING,
        **{(state, _V.KILL): _W.KILLED for state in (_W.STARTING, _W.READY, _W.LEAVING, _W.KILLED)},
        **{(state, _V.DIED): _W.DEAD for state in (_W.STARTING, _W.READY, _W.LEAVING, _W.KILLED)},
        (_W.KILLED, _V.READY): _W.KILLED,  # it was on its way
    }
)

StateT = TypeVar("StateT", bound=Enum)
EventT = TypeVar("EventT", bound=Enum)


class Machine(Generic[StateT, EventT]):
    """Walks one of the tables."""

    def __init__(self, table: Mapping[tuple[StateT, EventT], StateT], state: StateT) -> None:
        self._table = table
        self.state = state

    def on(self, event: EventT) -> StateT:
        """The state after ``event``. ``ProtocolError`` for an illegal one, which leaves the state as it was."""
        after = self._table.get((self.state, event))
        if after is None:
            kind = type(self.state).__name__.removesuffix("State").lower()
            raise ProtocolError(f"{event.name} cannot happen to a {kind} that is {self.state.name}")
        self.state = after
        return after


def save_machine() -> Machine[SaveState, SaveEvent]:
    """A new save's."""
    return Machine(SAVE_TRANSITIONS, SaveState.NEW)


def worker_machine() -> Machine[WorkerState, WorkerEvent]:
    """A new worker's."""
    return Machine(WORKER_TRANSITIONS, WorkerState.STARTING)
