"""Commit, decided without I/O: what a rank saw goes in, what it is to do comes out.

All ranks of a save meet in the storage. Each makes its data and its Index durable; rank 0, the committer, waits until
all indexes are there, checks that they cover the state, and claims the save's Record. Whoever gives up claims the same
Record with an abort first. The name is won once, so all ranks agree, and no clock decides.

``TRANSITIONS`` says all that may happen; ``CommitMachine`` walks it. ``settle.py`` carries the actions out.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from types import MappingProxyType


class State(Enum):
    """Where one rank stands in one save."""

    WRITING = auto()
    """Data or Index are not durable yet."""
    COLLECTING = auto()
    """The committer waits for the other ranks' indexes."""
    CHECKING = auto()
    """The committer checks that what was written covers what is held."""
    CLAIMING = auto()
    """The committer's claim of the commit is under way. Nothing interrupts it."""
    WAITING = auto()
    """Another rank waits for the Record."""
    ABORTING = auto()
    """The committer claims an abort; it has not tried to commit, so nobody can have."""
    RETRACTING = auto()
    """A rank claims an abort while a commit may be out already."""
    READING = auto()
    """The name was lost, or could not be won; the Record that is there, if any, is being read."""
    PUBLISHING = auto()
    """A commit was found; this rank makes it durable from its side."""
    COMMITTED = auto()
    ABORTED = auto()
    """An abort is in the Record: this rank's or another's."""
    FAILED = auto()
    """The committer could not even claim its abort; the save was never published and never will be."""
    UNKNOWN = auto()
    """The Record can be neither won nor read."""


class Event(Enum):
    """What happened."""

    PREPARED = auto()
    """This rank's data and Index are durable."""
    GIVE_UP = auto()
    """Cancel, deadline, failure or refusal on this rank."""
    INDEXES_MISSING = auto()
    INDEXES_COMPLETE = auto()
    COVERED = auto()
    """The check found nothing wrong."""
    RECORD_MISSING = auto()
    FOUND_COMMIT = auto()
    FOUND_ABORT = auto()
    WON = auto()
    """The claim that was made is in the Record."""
    LOST = auto()
    """Another claim is in the Record."""
    CLAIM_FAILED = auto()
    """The claim was refused by the storage; nothing of it is there."""
    CLAIM_UNKNOWN = auto()
    """Whether the claim was won cannot be told."""
    PUBLISHED = auto()
    STORAGE_FAILED = auto()
    """The Record is not there or cannot be read, or could not be made durable."""


class Action(Enum):
    """What to do next; each ends in one of the events in the comment."""

    LIST = auto()  # INDEXES_MISSING, INDEXES_COMPLETE, FOUND_COMMIT, FOUND_ABORT, GIVE_UP
    CHECK = auto()  # COVERED, GIVE_UP
    CLAIM_COMMIT = auto()  # WON, LOST, CLAIM_FAILED, CLAIM_UNKNOWN
    CLAIM_ABORT = auto()  # WON, LOST, CLAIM_FAILED, CLAIM_UNKNOWN
    AWAIT_RECORD = auto()  # RECORD_MISSING, FOUND_COMMIT, FOUND_ABORT, GIVE_UP
    READ_RECORD = auto()  # FOUND_COMMIT, FOUND_ABORT, STORAGE_FAILED
    PUBLISH = auto()  # PUBLISHED, STORAGE_FAILED
    FINISH = auto()  # none: the state is final


_S, _E, _A = State, Event, Action
_Row = tuple[State, Action]

_COMMON: dict[tuple[State, Event], _Row] = {
    (_S.RETRACTING, _E.WON): (_S.ABORTED, _A.FINISH),
    (_S.RETRACTING, _E.LOST): (_S.READING, _A.READ_RECORD),
    (_S.RETRACTING, _E.CLAIM_FAILED): (_S.READING, _A.READ_RECORD),
    (_S.RETRACTING, _E.CLAIM_UNKNOWN): (_S.READING, _A.READ_RECORD),
    (_S.READING, _E.FOUND_COMMIT): (_S.PUBLISHING, _A.PUBLISH),
    (_S.READING, _E.FOUND_ABORT): (_S.ABORTED, _A.FINISH),
    (_S.READING, _E.STORAGE_FAILED): (_S.UNKNOWN, _A.FINISH),
    (_S.PUBLISHING, _E.PUBLISHED): (_S.COMMITTED, _A.FINISH),
    (_S.PUBLISHING, _E.STORAGE_FAILED): (_S.UNKNOWN, _A.FINISH),
}

TRANSITIONS: Mapping[str, Mapping[tuple[State, Event], _Row]] = MappingProxyType(
    {
        "committer": MappingProxyType(
            {
                **_COMMON,
                (_S.WRITING, _E.PREPARED): (_S.COLLECTING, _A.LIST),
                (_S.WRITING, _E.GIVE_UP): (_S.ABORTING, _A.CLAIM_ABORT),
                (_S.COLLECTING, _E.INDEXES_MISSING): (_S.COLLECTING, _A.LIST),
                (_S.COLLECTING, _E.INDEXES_COMPLETE): (_S.CHECKING, _A.CHECK),
                (_S.COLLECTING, _E.FOUND_ABORT): (_S.ABORTED, _A.FINISH),
                (_S.COLLECTING, _E.FOUND_COMMIT): (_S.PUBLISHING, _A.PUBLISH),
                (_S.COLLECTING, _E.GIVE_UP): (_S.ABORTING, _A.CLAIM_ABORT),
                (_S.CHECKING, _E.COVERED): (_S.CLAIMING, _A.CLAIM_COMMIT),
                (_S.CHECKING, _E.GIVE_UP): (_S.ABORTING, _A.CLAIM_ABORT),
                (_S.CLAIMING, _E.WON): (_S.COMMITTED, _A.FINISH),
                (_S.CLAIMING, _E.LOST): (_S.READING, _A.READ_RECORD),
                (_S.CLAIMING, _E.CLAIM_FAILED): (_S.ABORTING, _A.CLAIM_ABORT),
                (_S.CLAIMING, _E.CLAIM_UNKNOWN): (_S.RETRACTING, _A.CLAIM_ABORT),
                (_S.ABORTING, _E.WON): (_S.ABORTED, _A.FINISH),
                (_S.ABORTING, _E.LOST): (_S.READING, _A.READ_RECORD),
                (_S.ABORTING, _E.CLAIM_FAILED): (_S.FAILED, _A.FINISH),
                (_S.ABORTING, _E.CLAIM_UNKNOWN): (_S.FAILED, _A.FINISH),
            }
        ),
        "peer": MappingProxyType(
            {
                **_COMMON,
                (_S.WRITING, _E.PREPARED): (_S.WAITING, _A.AWAIT_RECORD),
                (_S.WRITING, _E.GIVE_UP): (_S.RETRACTING, _A.CLAIM_ABORT),
                (_S.WAITING, _E.RECORD_MISSING): (_S.WAITING, _A.AWAIT_RECORD),
                (_S.WAITING, _E.FOUND_COMMIT): (_S.PUBLISHING, _A.PUBLISH),
                (_S.WAITING, _E.FOUND_ABORT): (_S.ABORTED, _A.FINISH),
                (_S.WAITING, _E.GIVE_UP): (_S.RETRACTING, _A.CLAIM_ABORT),
            }
        ),
    }
)
FINAL = frozenset({State.COMMITTED, State.ABORTED, State.FAILED, State.UNKNOWN})


class IllegalTransition(RuntimeError):
    """An event that cannot happen in a state: a bug in asyncdcp."""


class CommitMachine:
    """One rank's way through one save. Rank 0 is the committer."""

    def __init__(self, rank: int) -> None:
        self.role = "peer" if rank else "committer"
        self.state = State.WRITING

    def on(self, event: Event) -> Action:
        """What to do after ``event``. An illegal one raises and leaves the state as it was."""
        row = TRANSITIONS[self.role].get((self.state, event))
        if row is None:
            raise IllegalTransition(f"{event.name} cannot happen to a {self.role} that is {self.state.name}")
        self.state, action = row
        return action
