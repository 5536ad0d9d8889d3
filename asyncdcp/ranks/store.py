"""StoreRanks: agreements over a ``torch.distributed.Store``, which every launcher brings along.

An agreement of a topic is a few keys, under the topic's name and the agreement's number:

    told/<rank>   what a rank tells; rank 0 reads all of them
    won           a counter: who counts it to 1 may say how the agreement ends, once and for all
    verdict       how it ended: the decision, or who failed and why. All ranks go by it, so they all end alike
    read          a counter: the last to read the verdict removes the keys

The store is only ever asked what is there, by short calls on threads: a wait in it could neither be cancelled, nor
would it say who is missing. Long values are cut, since a TCPStore takes no message of more than 8 MiB.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar, TypeVarTuple

import anyio
import msgspec
from anyio import to_thread
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # torch exports them without saying so

from asyncdcp.errors import AsyncDCPError, Cancelled, PeerError, PeerFailed
from asyncdcp.ranks.links import Links
from asyncdcp.ranks.port import Decide
from asyncdcp.unwinding import ungrouped
from asyncdcp.worker.failures import from_frame, to_frame
from asyncdcp.worker.protocol import ErrorFrame

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_PART_BYTES = 4 << 20
_POLL_SECONDS = 0.001
_POLL_LIMIT_SECONDS = 0.05
_LAST_WORD_SECONDS = 5.0
"""How long the verdict is waited for that somebody else has won the right to say."""


class _Verdict(msgspec.Struct):
    """``parts`` of the decision follow. Or ``error`` ended it: the agreement's own, or that of ``rank`` alone."""

    parts: int = 0
    rank: int | None = None
    error: ErrorFrame | None = None


class StoreRanks:
    """As ``Ranks``. All ranks give a store that shares its keys with the others', and that nobody else uses; and the
    same deadline, which errors call ``option``. Used on one event loop at a time.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, *, deadline: float, option: str = "option agreement_deadline"
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.deadline = deadline
        self.requests = 0
        """How many calls of the store there were, for tests and statistics."""
        self._store = store
        self._option = option
        self._turns: Counter[str] = Counter()
        self._parted: list[str] = []

    async def decide(self, topic: str, told: bytes, decide: Decide, *, deadline: float | None = None) -> bytes:
        """As ``Ranks``."""
        key, limit = self._next(topic), deadline or self.deadline
        try:
            with anyio.fail_after(limit):
                return await self._take_part(key, told, decide)
        except TimeoutError:
            return await self._end_wait(topic, key, limit)
        except anyio.get_cancelled_exc_class():
            with anyio.move_on_after(_LAST_WORD_SECONDS, shield=True):
                await self._fail(key, Cancelled(f"the agreement on {topic} was cancelled"), self.rank)
            raise

    async def refuse(self, topic: str, error: AsyncDCPError) -> None:
        """As ``Ranks``."""
        key = self._next(topic)
        await self._fail(key, error, self.rank)
        await self._count_reader(key, 0, self.world_size)

    async def broadcast(self, topic: str, data: bytes | None) -> bytes:
        """As ``Ranks``."""
        key = self._next(topic)
        if self.rank == 0:
            assert data is not None
            await self._say(key, data)
            return data
        with anyio.move_on_after(self.deadline):
            return await self._hear(key, self.world_size - 1)
        raise self._late(topic, [0], self.deadline)

    async def announce(self, name: str, data: bytes) -> None:
        """As ``Ranks``."""
        await self._set(f"announced/{name}", data)

    async def heard(self, name: str) -> bytes | None:
        """As ``Ranks``."""
        key = f"announced/{name}"
        return await self._get_one(key) if await self._there(key) else None

    async def connect(self, name: str, *, until: float) -> Links:
        """As ``Ranks``. Where it fails, a key says so to the others; it goes when the ranks connect the next time."""
        key = f"links/{name}"
        parted, self._parted = self._parted, []
        try:
            await self._delete(parted)
            with ungrouped():
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._watch, f"{key}/parted")
                    store = PrefixStore(key, await self._call(own_connection, self._store))
                    links = await Links.connect(store, self.rank, self.world_size, deadline=self.deadline, until=until)
                    tasks.cancel_scope.cancel()
        except BaseException:
            with anyio.move_on_after(_LAST_WORD_SECONDS, shield=True), suppress(PeerError):
                self._parted += [*parted, f"{key}/parted"]
                await self._set(f"{key}/parted", str(self.rank).encode())
            raise
        return links

    async def _watch(self, name: str) -> None:
        """Until somebody says there that it does not connect."""
        async for _ in self._poll():
            if await self._there(name):
                rank = int(await self._get_one(name))
                raise PeerFailed(f"rank {rank} failed, or was cancelled, when the ranks were to connect", rank=rank)

    async def _take_part(self, key: str, told: bytes, decide: Decide) -> bytes:
        await self._put(f"{key}/told/{self.rank}", told)
        failure = await self._preside(key, decide) if self.rank == 0 else None
        try:
            return await self._hear(key, self.world_size)
        except AsyncDCPError:
            if failure is not None:
                raise failure from failure.__cause__
            raise

    # ── rank 0 ──

    async def _preside(self, key: str, decide: Decide) -> AsyncDCPError | None:
        """Collects what all tell, decides and says so; unless somebody ends the agreement before. What ``decide``
        raised.
        """
        keys = [f"{key}/told/{rank}" for rank in range(self.world_size)]
        async for _ in self._poll():
            if await self._there(f"{key}/verdict"):
                return None
            if await self._there(*keys):
                break
        told = [await self._get(name) for name in keys]
        try:
            decision = await to_thread.run_sync(decide, told)
        except Exception as error:  # noqa: BLE001  # all ranks hear of it
            known = error
            if not isinstance(known, AsyncDCPError):
                known = PeerError(f"the decision failed: {type(error).__name__}: {error}")
                known.__cause__ = error
            await self._fail(key, known, None)
            return known
        await self._say(key, decision)
        return None

    async def _say(self, key: str, decision: bytes) -> None:
        """The decision, unless somebody has ended the agreement otherwise."""
        if await self._wins(key):
            parts = await self._put_parts(f"{key}/verdict", decision)
            await self._set(f"{key}/verdict", msgspec.msgpack.encode(_Verdict(parts)))

    # ── all ranks ──

    async def _hear(self, key: str, readers: int) -> bytes:
        """The decision, once it is there, or the failure."""
        name = f"{key}/verdict"
        async for _ in self._poll():
            if await self._there(name):
                break
        verdict = msgspec.msgpack.decode(await self._get_one(name), type=_Verdict)
        decision = await self._get_parts(name, verdict.parts)
        await self._count_reader(key, verdict.parts, readers)
        if verdict.error is not None:
            raise _failure(verdict.error, verdict.rank)
        return decision

    async def _count_reader(self, key: str, parts: int, readers: int) -> None:
        """The last one to have read removes the keys."""
        if await self._add(f"{key}/read") == readers:
            told = [f"{key}/told/{rank}" for rank in range(self.world_size)]
            verdict = f"{key}/verdict"
            await self._delete([verdict, *_parts(verdict, parts), f"{key}/won", f"{key}/read"])
            for name in told:
                await self._delete_parts(name)

    async def _end_wait(self, topic: str, key: str, limit: float) -> bytes:
        """The deadline has passed: this rank ends the agreement, unless another has, whose word then counts."""
        error = self._late(topic, [0], limit)
        with anyio.move_on_after(_LAST_WORD_SECONDS):
            missing = [rank for rank in range(self.world_size) if not await self._there(f"{key}/told/{rank}")]
            error = self._late(topic, missing or [0], limit)
            await self._fail(key, error, error.rank)
            return await self._hear(key, self.world_size)
        raise error

    def _late(self, topic: str, missing: Sequence[int], limit: float) -> PeerFailed:
        shown = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
        option = f" ({self._option})" if limit == self.deadline else ""  # a longer one is the caller's
        return PeerFailed(
            f"rank {shown} did not come to the agreement on {topic} within {limit:g} s{option}: "
            "it failed, or does not make the calls that the others make",
            rank=missing[0],
        )

    async def _fail(self, key: str, error: AsyncDCPError, rank: int | None) -> None:
        if await self._wins(key):
            verdict = _Verdict(0, rank, to_frame(error, with_traceback=False))
            await self._set(f"{key}/verdict", msgspec.msgpack.encode(verdict))

    async def _wins(self, key: str) -> bool:
        return await self._add(f"{key}/won") == 1

    def _next(self, topic: str) -> str:
        self._turns[topic] += 1
        return f"{topic}/{self._turns[topic]}"

    # ── the store ──

    async def _poll(self) -> AsyncIterator[None]:
        """Now, and again and again, less often as time goes by and with many ranks."""
        delay, limit = _POLL_SECONDS, _POLL_LIMIT_SECONDS * max(1, self.world_size / 256)
        while True:
            yield
            await anyio.sleep(delay)
            delay = min(delay * 1.5, limit)

    async def _put(self, name: str, data: bytes) -> None:
        parts = await self._put_parts(name, data)
        await self._set(name, str(parts).encode())

    async def _get(self, name: str) -> bytes:
        return await self._get_parts(name, int(await self._get_one(name)))

    async def _put_parts(self, name: str, data: bytes) -> int:
        count = -(-len(data) // _PART_BYTES)
        for number, part in enumerate(_parts(name, count)):
            await self._set(part, data[number * _PART_BYTES : (number + 1) * _PART_BYTES])
        return count

    async def _get_parts(self, name: str, count: int) -> bytes:
        return b"".join([await self._get_one(part) for part in _parts(name, count)])

    async def _delete_parts(self, name: str) -> None:
        if await self._there(name):
            await self._delete([*_parts(name, int(await self._get_one(name))), name])

    async def _set(self, name: str, data: bytes) -> None:
        await self._call(self._store.set, name, data)  # type: ignore[arg-type]  # its stub says str; bytes are meant

    async def _get_one(self, name: str) -> bytes:
        return await self._call(self._store.get, name)

    async def _there(self, *names: str) -> bool:
        return await self._call(self._store.check, list(names))

    async def _add(self, name: str) -> int:
        return await self._call(self._store.add, name, 1)

    async def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            await self._call(self._store.delete_key, name)

    async def _call(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        self.requests += 1
        try:
            return await to_thread.run_sync(partial(function, *args), abandon_on_cancel=True)
        except RuntimeError as error:  # torch's DistError and its kin
            raise PeerError(f"the store of the process group does not answer: {error!s:.300}") from error


def own_connection(store: Store) -> Store:
    """A connection of our own, so that no wait of torch's is behind us, nor we behind it; where that can be had."""
    try:
        own: Store = store.clone()  # type: ignore[attr-defined]  # since torch 2.9
    except (AttributeError, NotImplementedError, RuntimeError):
        return store
    return own


def _parts(name: str, count: int) -> list[str]:
    return [f"{name}.{number}" for number in range(count)]


def _failure(frame: ErrorFrame, rank: int | None) -> AsyncDCPError:
    """The error of the agreement as it is; that of one rank as ``PeerFailed``."""
    error = from_frame(frame)
    if rank is None or isinstance(error, PeerFailed):
        return error
    return PeerFailed(f"rank {rank} failed: {error}", rank=rank)
