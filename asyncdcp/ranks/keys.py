"""Keys: what ranks have in a ``torch.distributed.Store``, by short calls on threads; and a meeting there, by which the
ranks of now find each other, whoever has been there before them.

The store is only ever asked what is there: a wait in it could neither be cancelled, nor would it say who is missing.
Long values are cut, since a TCPStore takes no message of more than 8 MiB.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from typing import TypeVar, TypeVarTuple

import anyio
import msgspec
from anyio import to_thread
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # torch exports them without saying so

from asyncdcp.errors import PeerError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_PART_BYTES = 4 << 20
_POLL_SECONDS = 0.001
_POLL_LIMIT_SECONDS = 0.05
LAST_WORD_SECONDS = 5.0
"""How long who is cancelled, or late, still talks to the store."""


class Keys:
    """The keys of ``world_size`` ranks. Every call raises ``PeerError`` where the store does not answer."""

    def __init__(self, store: Store, world_size: int) -> None:
        self.requests = 0
        """How many calls of the store there were, for tests and statistics."""
        self._store = store
        self._world_size = world_size

    def move(self, name: str) -> None:
        """From here on all keys are below this one."""
        self._store = PrefixStore(name, self._store)

    async def connected(self, name: str) -> Store:
        """What is below a key, by a connection of its own."""
        return PrefixStore(name, await self._call(own_connection, self._store))

    async def poll(self) -> AsyncIterator[None]:
        """Now, and again and again, less often as time goes by and with many ranks."""
        delay, limit = _POLL_SECONDS, _POLL_LIMIT_SECONDS * max(1, self._world_size / 256)
        while True:
            yield
            await anyio.sleep(delay)
            delay = min(delay * 1.5, limit)

    async def there(self, *names: str) -> bool:
        """Whether all of them are."""
        return await self._call(self._store.check, list(names))

    async def set(self, name: str, data: bytes) -> None:
        """A short value, in the place of what was there."""
        await self._call(self._store.set, name, data)  # type: ignore[arg-type]  # its stub says str; bytes are meant

    async def get(self, name: str) -> bytes:
        """A short value, which is there."""
        return await self._call(self._store.get, name)

    async def add(self, name: str) -> int:
        """One more, and how many there are then."""
        return await self._call(self._store.add, name, 1)

    async def delete(self, names: Iterable[str]) -> None:
        """One after another; those that are not there too."""
        for name in names:
            await self._call(self._store.delete_key, name)

    # ── long values ──

    async def put(self, name: str, data: bytes) -> None:
        """A value of any length; its name says in how many parts, once all of them are there."""
        parts = await self.put_parts(name, data)
        await self.set(name, str(parts).encode())

    async def take(self, name: str) -> bytes:
        """What was ``put``."""
        return await self.get_parts(name, int(await self.get(name)))

    async def drop(self, name: str) -> None:
        """Deletes what was ``put``, if it is there."""
        if await self.there(name):
            await self.delete([*parts_of(name, int(await self.get(name))), name])

    async def put_parts(self, name: str, data: bytes) -> int:
        """The parts alone; how many there are."""
        count = -(-len(data) // _PART_BYTES)
        for number, part in enumerate(parts_of(name, count)):
            await self.set(part, data[number * _PART_BYTES : (number + 1) * _PART_BYTES])
        return count

    async def get_parts(self, name: str, count: int) -> bytes:
        """What they are together."""
        return b"".join([await self.get(part) for part in parts_of(name, count)])

    async def _call(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        self.requests += 1
        try:
            return await to_thread.run_sync(partial(function, *args), abandon_on_cancel=True)
        except RuntimeError as error:  # torch's DistError and its kin
            raise PeerError(
                f"the store of the process group does not answer: {error!s:.300} (it ends with the process that hosts "
                "it, often rank 0, and with destroy_process_group(): close checkpointers before)"
            ) from error


def own_connection(store: Store) -> Store:
    """A connection of our own, so that no wait of torch's is behind us, nor we behind it; where that can be had."""
    try:
        own: Store = store.clone()  # type: ignore[attr-defined]  # since torch 2.9
    except (AttributeError, NotImplementedError, RuntimeError):
        return store
    return own


def parts_of(name: str, count: int) -> list[str]:
    """The names of a value's parts."""
    return [f"{name}.{number}" for number in range(count)]


class _Here(msgspec.Struct):
    call: str
    name: str


class _Met(msgspec.Struct):
    call: str
    names: list[str]


class Meeting:
    """One rank's part in a meeting. Several meetings, one after another, are kept apart. Who gives up and comes again
    comes by the same one, by which others may have met it meanwhile.

    A store may outlive the processes that use it: torchrun's agent keeps one through all restarts of its workers, which
    find there what those before them have left. So nothing there is believed that does not answer what was said just
    now:

        call          a name by which nobody was called before, from rank 0
        here/<rank>   the call that a rank has heard, and a name of its own
        met           once all have answered its call, rank 0 puts that there, with the names of all

    Who finds its own name in ``met`` is one of those, and all that they say to each other is below the name of their
    call.
    """

    def __init__(self, keys: Keys, rank: int, world_size: int) -> None:
        self._keys = keys
        self._rank = rank
        self._others = range(1, world_size)
        self._name = uuid.uuid4().hex
        self._heard = self._name if rank == 0 else ""

    async def meet(self) -> str:
        """Returns the name of the call once all ranks have come."""
        return await (self._call() if self._rank == 0 else self._answer())

    async def missing(self) -> list[int]:
        """Who has not come yet, as far as this rank can see."""
        return [rank for rank in self._others if await self._answer_of(rank) is None] if self._heard else [0]

    async def _call(self) -> str:
        await self._say("call", self._name.encode())
        async for _ in self._keys.poll():
            if (names := await self._answers()) is not None:
                await self._say("met", msgspec.msgpack.encode(_Met(self._name, names)))
                return self._name
        raise AssertionError("polling has no end")

    async def _answers(self) -> list[str] | None:
        """The names of all others; None while one has not come. Each time anew: one may give up and come again."""
        names: list[str] = []
        for rank in self._others:
            if (name := await self._answer_of(rank)) is None:
                return None
            names.append(name)
        return names

    async def _answer_of(self, rank: int) -> str | None:
        if not await self._keys.there(f"here/{rank}"):
            return None
        here = msgspec.msgpack.decode(await self._keys.get(f"here/{rank}"), type=_Here)
        return here.name if here.call == self._heard else None

    async def _answer(self) -> str:
        async for _ in self._keys.poll():
            if not await self._keys.there("call"):
                continue
            call = (await self._keys.get("call")).decode()
            if self._heard and (met := await self._end()) is not None:  # before a newer call, of the next meeting
                return met
            if call != self._heard:
                await self._say(f"here/{self._rank}", msgspec.msgpack.encode(_Here(call, self._name)))
                self._heard = call
        raise AssertionError("polling has no end")

    async def _say(self, key: str, data: bytes) -> None:
        """Even if cancelled: what a thread was left alone with would come after what is said next."""
        with anyio.move_on_after(LAST_WORD_SECONDS, shield=True):
            await self._keys.set(key, data)

    async def _end(self) -> str | None:
        if not await self._keys.there("met"):
            return None
        met = msgspec.msgpack.decode(await self._keys.get("met"), type=_Met)
        return met.call if self._name in met.names else None
