"""The Ranks port: who this process is among its peers, and how all of them come to one decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import msgspec

from asyncdcp.errors import AsyncDCPError, UsageError
from asyncdcp.ranks.links import Links

Decide: TypeAlias = Callable[[Sequence[bytes]], bytes]
"""What rank 0 makes of what all ranks told it, in the order of ranks. It runs on a worker thread of rank 0."""


class Ranks(Protocol):
    """A job's ranks. All methods are collective: every rank calls them, for one topic in the same order.

    Topics are independent of each other. Every wait ends by ``deadline`` seconds. An agreement that fails, fails on
    every rank that takes part in it: ``PeerFailed`` names the rank that did not come, or that refused, and its cause.
    The next one of the topic is a new beginning.
    """

    @property
    def rank(self) -> int:
        """This process among its peers."""
        ...

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        ...

    @property
    def deadline(self) -> float:
        """In seconds."""
        ...

    async def decide(self, topic: str, told: bytes, decide: Decide, *, deadline: float | None = None) -> bytes:
        """Everyone tells rank 0, rank 0 decides, everyone hears the decision.

        An error that ``decide`` raises is raised on all ranks, as the same class with the same message if it is
        asyncdcp's, else as ``PeerError``. ``deadline`` is for agreements that follow on long work.
        """
        ...

    async def refuse(self, topic: str, error: AsyncDCPError) -> None:
        """Instead of ``decide``: this rank cannot take part, and all others shall hear why. Waits for nobody."""
        ...

    async def broadcast(self, topic: str, data: bytes | None) -> bytes:
        """What rank 0 says: ``data`` there, which waits for nobody. The others wait for it, and give None."""
        ...

    async def announce(self, name: str, data: bytes) -> None:
        """Not collective: puts up something small under a name, in the place of what was there."""
        ...

    async def heard(self, name: str) -> bytes | None:
        """Not collective: what was announced last under a name; None if nothing was yet. Waits for nobody."""
        ...

    async def connect(self, name: str, *, until: float) -> Links:
        """Connections among all ranks for one piece of work, which ends at ``until`` on the monotonic clock. All give
        one name, which no other piece of work has.

        ``PeerError`` where they do not all come; at once where one fails or is cancelled meanwhile. The connections
        end with the last reference to them: keep them until all ranks are known to be done.
        """
        ...


class SoleRank:
    """A job of one process: it is of one mind at once. Also for work that one rank of several does by itself, as
    ``AsyncCheckpointer(process_group=SoleRank())``.
    """

    rank = 0
    world_size = 1
    deadline = 0.0

    async def decide(self, topic: str, told: bytes, decide: Decide, *, deadline: float | None = None) -> bytes:
        """As ``Ranks``; ``decide`` runs at once."""
        return decide([told])

    async def refuse(self, topic: str, error: AsyncDCPError) -> None:
        """There is nobody to tell."""

    async def broadcast(self, topic: str, data: bytes | None) -> bytes:
        """``data``."""
        assert data is not None
        return data

    async def announce(self, name: str, data: bytes) -> None:
        """There is nobody to hear it."""

    async def heard(self, name: str) -> bytes | None:
        """Nobody announces anything."""
        return None

    async def connect(self, name: str, *, until: float) -> Links:
        """``UsageError``: there is nobody to connect to."""
        raise UsageError("a job of one rank has nobody to connect to")


async def gather(ranks: Ranks, topic: str, data: bytes) -> list[bytes]:
    """What every rank tells, to every rank."""
    return msgspec.msgpack.decode(await ranks.decide(topic, data, msgspec.msgpack.encode), type=list[bytes])


async def barrier(ranks: Ranks, topic: str) -> None:
    """Returns when all ranks have come."""
    await ranks.decide(topic, b"", lambda told: b"")


def first_rank(told: Sequence[bytes]) -> bytes:
    """The decision that what rank 0 told counts."""
    return told[0]
