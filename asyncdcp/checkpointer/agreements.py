"""What the ranks of a checkpointer agree on for their saves: which rank writes what, and that they write to one place.

They talk at the first save and at every ``prepare``. Later saves go by what was agreed, and nobody waits for anybody. A
state that has changed since is written by a rule that needs no talk: each rank writes all of what is new. Only what a
rank was to write for others, and does not have any more, is missing then: such a save is aborted
(``StructureChanged``), which all ranks see in its Record, and then they agree anew.

Saves are numbered on every rank as they are called. A new division is good from the first save on that no rank has
planned yet, so all ranks plan one save by one division, however far ahead of each other they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

import anyio
import msgspec
from anyio import to_thread

from asyncdcp.errors import AsyncDCPError, InvalidOption, StorageError, plain
from asyncdcp.planning import Structure
from asyncdcp.planning.division import Division, Pick, Rows, divide, share
from asyncdcp.planning.held_chunks import Holdings
from asyncdcp.ranks import Ranks, together
from asyncdcp.storage import Storage

_TOPIC = "what each rank holds"
_PLACE = "where the checkpoint is"
_LOOKS = (0.0, 0.1, 0.5, 2.0, 5.0)
"""Seconds before each look for what rank 0 has put."""


class Share(NamedTuple):
    """The structure of what this rank writes, and where in what it holds that is."""

    structure: Structure
    picks: list[Pick]


class _Agreed(NamedTuple):
    """A division, the first save that it is good for, and what tells it from others that begin there, too."""

    begin: int
    topic: str
    place: int
    division: Division


class _Heard(msgspec.Struct):
    """``Shares`` as they come: of each rank's, only this one's own are decoded."""

    rows: list[msgspec.Raw]
    begin: int


class _Way(msgspec.Struct):
    """Where and how a rank saves."""

    place: str
    transforms: list[str]


class SaveAgreements:
    """Used on the engine's loop, but for ``wanted``. ``transforms`` are those of this rank's saves."""

    def __init__(self, ranks: Ranks, transforms: Sequence[str] = ()) -> None:
        self._ranks = ranks
        self._transforms = list(transforms)
        self._divisions: list[_Agreed] = []
        self._latest: Holdings | None = None
        self._joined = self._planned = 0
        self.order = asyncio.Lock()
        """Held by a save while it agrees, so that whatever a later one refuses comes after."""
        self._renewed: set[str] = set()
        self._agreeing = 0
        self._agreed = asyncio.Event()
        self._probed = False
        self._shares: list[tuple[Structure, Division, Share]] = []

    @property
    def wanted(self) -> bool:
        """Whether the next save begins with an agreement."""
        return self._ranks.world_size > 1 and not self._divisions

    async def agree(self, held: Holdings, topic: str = _TOPIC) -> None:
        """Divides what all ranks hold. Collective. Saves that are to be planned wait meanwhile."""
        held.save = self._planned + 1
        told = msgspec.msgpack.encode(held)
        self._agreeing += 1
        try:
            heard = await self._ranks.decide(topic, told, _divided)
        finally:
            self._agreeing -= 1
            agreed, self._agreed = self._agreed, asyncio.Event()
            agreed.set()
        shares = msgspec.msgpack.decode(heard, type=_Heard)
        rows = msgspec.msgpack.decode(shares.rows[self._ranks.rank], type=list[list[Rows]])
        division = Division(held, rows)
        self._divisions.append(_Agreed(shares.begin, topic, len(self._divisions), division))
        self._latest = held.unmarked()

    def join(self, number: int) -> None:
        """Save ``number`` comes to whatever the ranks have to agree on for it."""
        self._joined = max(self._joined, number)

    async def refuse(self, number: int, error: AsyncDCPError) -> None:
        """Save ``number`` does not come; nothing where no agreement waits for it."""
        async with self.order:
            if self._joined >= number:
                return
            if not self._probed:
                await self._ranks.refuse(_PLACE, error)
            elif self.wanted:
                await self._ranks.refuse(_TOPIC, error)

    async def prepare(self, structure: Structure, held: Holdings) -> Share:
        """Agrees, whatever was agreed before, and returns this rank's part in the next save. Collective."""
        await self.agree(held)
        return await self._shared(self._planned + 1, structure)

    async def share(self, number: int, structure: Structure, held: Callable[[], Holdings]) -> Share:
        """What this rank writes of a structure in save ``number``. Collective at the first call."""
        while self._agreeing:
            await self._agreed.wait()
        if not self._divisions:
            await self.agree(held())
        self._planned = max(self._planned, number)
        if self._shares[:1] and self._shares[0][0] is not structure:
            self._latest = held().unmarked()
        return await self._shared(number, structure)

    async def _shared(self, number: int, structure: Structure) -> Share:
        division = self._division(number)
        for known in self._shares:
            if known[0] is structure and known[1] is division:
                self._shares = [known, *(other for other in self._shares if other is not known)]
                return known[2]
        picks = await to_thread.run_sync(division.picks, structure)
        made = Share(share(structure, picks, self._ranks.rank), picks)
        self._shares = [(structure, division, made), *self._shares[:3]]
        return made

    def _division(self, number: int) -> Division:
        """The newest one that is good for this save; the same on all ranks, in whatever order they came to know it."""
        good = [agreed for agreed in self._divisions if agreed.begin <= number] or self._divisions[:1]
        return max(good, key=lambda agreed: agreed[:3]).division

    async def renew(self, save_id: str) -> None:
        """Agrees anew after the save was aborted for a hole. Every rank comes to that by itself, once for a save."""
        if save_id not in self._renewed and self._latest is not None:
            self._renewed.add(save_id)
            await self.agree(self._latest, f"{_TOPIC} after save {save_id}")

    async def check_place(self, storage: Storage, save_id: str) -> None:
        """Makes sure, once, that all ranks write to one place, in one way. Collective at the first call."""
        if self._probed:
            return
        name = f"{save_id}.probe"

        async def put() -> bytes:
            if self._ranks.rank == 0:
                await storage.put(name, b"rank 0 was here")
            return msgspec.msgpack.encode(_Way(plain(storage.info.location), self._transforms))

        async def see() -> bytes:
            await _see(storage, name)
            return b""

        try:
            await together(self._ranks, _PLACE, put, _one_way)
            await together(self._ranks, f"{_PLACE}, seen by all", see)
            self._probed = True  # on all ranks, whatever becomes of this one's save
        finally:
            if self._ranks.rank == 0:
                await storage.delete([name])


async def _see(storage: Storage, name: str) -> None:
    """Looks for what rank 0 has put; for a while, since a network filesystem may show it late."""
    for delay in _LOOKS:
        await anyio.sleep(delay)
        try:
            await storage.get(name, 1 << 10)
        except FileNotFoundError:
            continue
        return
    location = storage.info.location
    raise StorageError(
        f"what rank 0 has written to {location} is not there on this rank: all ranks must save to one storage, which "
        "they share",
        path=location,
    )


def _one_way(told: Sequence[bytes]) -> bytes:
    first, *others = [msgspec.msgpack.decode(one, type=_Way) for one in told]
    for rank, way in enumerate(others, 1):
        if way.place != first.place:
            raise InvalidOption(
                f"rank 0 saves to {first.place}, rank {rank} to {way.place}: all ranks must give one path"
            )
        if way.transforms != first.transforms:
            raise InvalidOption(
                f"rank 0 saves with {_listed(first.transforms)}, rank {rank} with {_listed(way.transforms)}: all ranks "
                "must give the same extensions, with the same key"
            )
    return b""


def _listed(transforms: Sequence[str]) -> str:
    return f"the extensions {', '.join(transforms)}" if transforms else "no extensions"


def _divided(told: Sequence[bytes]) -> bytes:
    return msgspec.msgpack.encode(divide([msgspec.msgpack.decode(one, type=Holdings) for one in told]))
