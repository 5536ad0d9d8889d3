"""StoreRanks: agreements over a ``torch.distributed.Store``, which every launcher brings along.

An agreement of a topic is a few keys, under the topic's name and the agreement's number:

    told/<rank>   what a rank tells; rank 0 reads all of them
    won           a counter: who counts it to 1 may say how the agreement ends, once and for all
    verdict       how it ended: the decision, or who failed and why. All ranks go by it, so they all end alike
    read          a counter: the last to read the verdict removes the keys

Where others may have been in the store before, the ranks meet first (``keys.Meeting``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import anyio
import msgspec
from anyio import to_thread
from torch.distributed import Store  # type: ignore[attr-defined]  # torch exports it without saying so

from asyncdcp.errors import AsyncDCPError, Cancelled, PeerError, PeerFailed, plain
from asyncdcp.ranks.keys import LAST_WORD_SECONDS, Keys, Meeting, parts_of
from asyncdcp.ranks.links import Links
from asyncdcp.ranks.port import Decide
from asyncdcp.unwinding import ungrouped
from asyncdcp.worker.failures import from_frame, to_frame
from asyncdcp.worker.protocol import ErrorFrame


class _Verdict(msgspec.Struct):
    """``parts`` of the decision follow. Or ``error`` ended it: the agreement's own, or that of ``rank`` alone."""

    parts: int = 0
    rank: int | None = None
    error: ErrorFrame | None = None


class StoreRanks:
    """As ``Ranks``. All ranks give a store that shares its keys with the others', and that nobody else uses; and the
    same deadline, which errors call ``option``. A topic is used on one event loop.

    With ``meets`` the store may hold what others have left that came before: then the first call of all, which every
    rank waits for before it makes another, waits for all ranks.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        deadline: float,
        option: str = "option agreement_deadline",
        meets: bool = False,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.deadline = deadline
        self._keys = Keys(store, world_size)
        self._option = option
        self._meeting = Meeting(self._keys, rank, world_size) if meets else None
        self._turns: Counter[str] = Counter()
        self._parted: list[str] = []

    @property
    def requests(self) -> int:
        """How many calls of the store there were, for tests and statistics."""
        return self._keys.requests

    async def decide(self, topic: str, told: bytes, decide: Decide, *, deadline: float | None = None) -> bytes:
        """As ``Ranks``."""
        key, limit = self._next(topic), deadline or self.deadline
        await self._meet(topic)
        came = False

        def decide_for_all(told: Sequence[bytes]) -> bytes:
            nonlocal came
            came = True
            return decide(told)

        try:
            with anyio.fail_after(limit):
                return await self._take_part(key, told, decide_for_all)
        except TimeoutError:
            return await self._end_wait(topic, key, limit)
        except anyio.get_cancelled_exc_class():
            with anyio.move_on_after(LAST_WORD_SECONDS, shield=True):
                await self._fail(key, Cancelled(f"the agreement on {topic} was cancelled"), self.rank)
            raise
        finally:
            if came:
                await self._outlast(key)

    async def refuse(self, topic: str, error: AsyncDCPError) -> None:
        """As ``Ranks``."""
        key = self._next(topic)
        await self._meet(topic)
        await self._fail(key, error, self.rank)
        await self._count_reader(key, 0, self.world_size)

    async def broadcast(self, topic: str, data: bytes | None) -> bytes:
        """As ``Ranks``."""
        key = self._next(topic)
        await self._meet(topic)
        if self.rank == 0:
            assert data is not None
            await self._say(key, data)
            return data
        with anyio.move_on_after(self.deadline):
            return await self._hear(key, self.world_size - 1)
        raise self._late(topic, [0], self.deadline)

    async def announce(self, name: str, data: bytes) -> None:
        """As ``Ranks``."""
        await self._meet(name)
        await self._keys.set(f"announced/{name}", data)

    async def heard(self, name: str) -> bytes | None:
        """As ``Ranks``."""
        key = f"announced/{name}"
        await self._meet(name)
        return await self._keys.get(key) if await self._keys.there(key) else None

    async def connect(self, name: str, *, until: float) -> Links:
        """As ``Ranks``. Where it fails, a key says so to the others; it goes when the ranks connect the next time."""
        key = f"links/{name}"
        await self._meet(name)
        parted, self._parted = self._parted, []
        try:
            await self._keys.delete(parted)
            with ungrouped():
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._watch, f"{key}/parted")
                    store = await self._keys.connected(key)
                    links = await Links.connect(store, self.rank, self.world_size, deadline=self.deadline, until=until)
                    tasks.cancel_scope.cancel()
        except BaseException:
            with anyio.move_on_after(LAST_WORD_SECONDS, shield=True), suppress(PeerError):
                self._parted += [*parted, f"{key}/parted"]
                await self._keys.set(f"{key}/parted", str(self.rank).encode())
            raise
        return links

    async def _meet(self, topic: str) -> None:
        if (meeting := self._meeting) is None:
            return
        with anyio.move_on_after(self.deadline):
            self._keys.move(await meeting.meet())
            self._meeting = None
            return
        missing: list[int] = []
        with anyio.move_on_after(LAST_WORD_SECONDS):
            missing = await meeting.missing()
        raise self._late(topic, missing or [0], self.deadline)

    async def _watch(self, name: str) -> None:
        """Until somebody says there that it does not connect."""
        async for _ in self._keys.poll():
            if await self._keys.there(name):
                rank = int(await self._keys.get(name))
                raise PeerFailed(f"rank {rank} failed, or was cancelled, when the ranks were to connect", rank=rank)

    async def _take_part(self, key: str, told: bytes, decide: Decide) -> bytes:
        await self._keys.put(f"{key}/told/{self.rank}", told)
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
        async for _ in self._keys.poll():
            if await self._keys.there(f"{key}/verdict"):
                return None
            if await self._keys.there(*keys):
                break
        told = [await self._keys.take(name) for name in keys]
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
        """The decision, unless somebody has ended the agreement otherwise. Even if cancelled: who has won is the only
        one who may say anything. ``PeerError`` if the store does not answer within the deadline.
        """
        with anyio.move_on_after(self.deadline + LAST_WORD_SECONDS, shield=True) as scope:
            if await self._wins(key):
                parts = await self._keys.put_parts(f"{key}/verdict", decision)
                await self._keys.set(f"{key}/verdict", msgspec.msgpack.encode(_Verdict(parts)))
        if scope.cancelled_caught:
            raise self._silent()

    async def _outlast(self, key: str) -> None:
        """Until all have read, if they are quick: the store may be this process's, and end with it."""
        with anyio.move_on_after(LAST_WORD_SECONDS, shield=True), suppress(PeerError):
            async for _ in self._keys.poll():
                if not await self._keys.there(f"{key}/read"):
                    return

    # ── all ranks ──

    async def _hear(self, key: str, readers: int) -> bytes:
        """The decision, once it is there, or the failure. Who sees it ends by it, even if cancelled."""
        name = f"{key}/verdict"
        async for _ in self._keys.poll():
            if await self._keys.there(name):
                break
        with anyio.move_on_after(self.deadline + LAST_WORD_SECONDS, shield=True):  # all others go by it, too
            verdict = msgspec.msgpack.decode(await self._keys.get(name), type=_Verdict)
            decision = await self._keys.get_parts(name, verdict.parts)
            await self._count_reader(key, verdict.parts, readers)
            if verdict.error is not None:
                raise _failure(verdict.error, verdict.rank)
            return decision
        raise self._silent()

    async def _count_reader(self, key: str, parts: int, readers: int) -> None:
        """The last one to have read removes the keys."""
        if await self._keys.add(f"{key}/read") == readers:
            told = [f"{key}/told/{rank}" for rank in range(self.world_size)]
            verdict = f"{key}/verdict"
            for name in told:
                await self._keys.drop(name)
            await self._keys.delete([verdict, *parts_of(verdict, parts), f"{key}/won", f"{key}/read"])

    async def _end_wait(self, topic: str, key: str, limit: float) -> bytes:
        """The deadline has passed: this rank ends the agreement, unless another has, whose word then counts."""
        error = self._late(topic, [0], limit)
        with anyio.move_on_after(LAST_WORD_SECONDS):
            missing = [rank for rank in range(self.world_size) if not await self._keys.there(f"{key}/told/{rank}")]
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

    def _silent(self) -> PeerError:
        return PeerError(f"the store of the process group did not answer within {self.deadline:g} s ({self._option})")

    async def _fail(self, key: str, error: AsyncDCPError, rank: int | None) -> None:
        with anyio.move_on_after(LAST_WORD_SECONDS, shield=True):  # as in ``_say``
            if await self._wins(key):
                verdict = _Verdict(0, rank, to_frame(error, with_traceback=False))
                await self._keys.set(f"{key}/verdict", msgspec.msgpack.encode(verdict))

    async def _wins(self, key: str) -> bool:
        return await self._keys.add(f"{key}/won") == 1

    def _next(self, topic: str) -> str:
        self._turns[topic] += 1
        return f"{plain(topic)}/{self._turns[topic]}"


def _failure(frame: ErrorFrame, rank: int | None) -> AsyncDCPError:
    """The error of the agreement as it is; that of one rank as ``PeerFailed``."""
    error = from_frame(frame)
    if rank is None or isinstance(error, PeerFailed):
        return error
    return PeerFailed(f"rank {rank} failed: {error}", rank=rank)
