"""Whether to save at a step, alike on all ranks, without a collective in the training loop.

Steps are cut into windows of ``WINDOW`` steps. What only rank 0 can decide (by a clock, a signal, a function of the
program's) it decides as it enters a window, for the *next* one: the first step of that at which it is asked. It puts
the decision up in the ranks' store, and the others fetch it in the background while they go through the window before;
as they enter a window they know what was decided for it. Nobody ever acts on a decision that another does not know:
who comes before rank 0 has decided waits for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final

import anyio
import msgspec

from asyncdcp.engine import Engine
from asyncdcp.errors import PeerFailed
from asyncdcp.futures import CheckpointFuture
from asyncdcp.manager.policies import Moment, SavePolicy
from asyncdcp.manager.preemption import Preemption
from asyncdcp.ranks import Ranks

WINDOW: Final = 8
_REMEMBERED: Final = 64
_POLL_SECONDS = 0.02


class Decision(msgspec.Struct, frozen=True):
    """What is to happen at a step: a save; the last one, since the job ends; the report of a failure."""

    save: bool = False
    preempted: bool = False
    failure: str | None = None


class _Board(msgspec.Struct):
    """What rank 0 has decided for windows up to ``until``, the latest last, and puts up under the name ``topic``."""

    topic: str = "decisions"
    until: int = -1
    decided: list[tuple[int, Decision]] = []

    def between(self, after: int, upto: int) -> Decision:
        """All that was decided for windows ``after < window <= upto``."""
        found = [decision for window, decision in self.decided if after < window <= upto]
        return Decision(
            any(decision.save for decision in found),
            any(decision.preempted for decision in found),
            next((decision.failure for decision in found if decision.failure is not None), None),
        )


class Decider:
    """Asked by the training loop, once a step. ``failure`` tells what has failed on this rank and is to be reported."""

    def __init__(
        self,
        policies: Sequence[SavePolicy],
        preemption: Preemption | None,
        ranks: Ranks,
        engine: Engine,
        failure: Callable[[], str | None],
    ) -> None:
        self._by_step = [policy for policy in policies if policy.by_step]
        self._by_rank_0 = [policy for policy in policies if not policy.by_step]
        self._preemption = preemption
        self._ranks = ranks
        self._engine = engine
        self._failure = failure
        self._since = time.monotonic()
        self._passes = 0
        self._window: int | None = None
        self._board = _Board()
        self._background: CheckpointFuture[None] | None = None
        self._heard_preempted = False
        self._heard_failure: str | None = None
        self._told: set[tuple[str, str]] = set()
        self._reported: set[str] = set()
        self._lock = asyncio.Lock()
        self.preempted = False

    def saved(self) -> None:
        """A save was called: the clock of ``Moment.seconds`` begins anew."""
        self._since = time.monotonic()

    def close(self) -> None:
        """Nothing is asked any more. What rank 0 has decided is put up all the same: others may come to it yet."""
        if self._background is not None:
            if self._ranks.rank:
                self._background.cancel()
            self._background.mark_seen()

    def begin_anew(self) -> None:
        """What comes now are other steps, as after a rollback: nothing that was decided for those before counts for
        them. All ranks call it between the same two steps.
        """
        self.close()
        self._passes += 1
        self._window, self._board, self._background = None, _Board(f"decisions of pass {self._passes}"), None

    def decide(self, step: int) -> Decision:
        """The decision for a step, which is asked for once. Blocks only for what rank 0 has not decided yet."""
        moment = self._moment(step)
        by_step = any(policy.due(moment) for policy in self._by_step)
        if self._ranks.world_size == 1:
            found = Decision(any(policy.due(moment) for policy in self._by_rank_0), moment.preempted)
        else:
            found = self._agree(step // WINDOW, moment, by_step=by_step)
        if found.preempted and not self.preempted:
            self.preempted = True
            if self._preemption is not None:
                self._preemption.know()
        return msgspec.structs.replace(found, save=found.save or by_step)

    def _moment(self, step: int) -> Moment:
        signalled = self._preemption is not None and self._preemption.answer()
        asked = (signalled or self._heard_preempted) and not self.preempted
        return Moment(step, time.monotonic() - self._since, asked)

    def _agree(self, window: int, moment: Moment, *, by_step: bool) -> Decision:
        before, self._window = self._window, window
        if before is not None and window <= before:
            return Decision()
        if self._ranks.rank == 0:
            found = self._board.between(before, window) if before is not None else Decision()
            self._preside(window, moment._replace(seconds=0.0) if found.save or by_step else moment, found)
            return found
        if self._background is not None:
            self._background.result()
        if before is not None and self._board.until < window:
            self._engine.submit(self._fetch, window).result()
        self._background = self._engine.submit(self._attend, window + 1)
        return self._board.between(before, window) if before is not None else Decision()

    def _preside(self, window: int, moment: Moment, now: Decision) -> None:
        """Rank 0 decides for the next window, and says so in the background."""
        failure = None if now.failure is not None else self._failure() or self._heard_failure
        if failure is not None:
            self._reported.add(failure)
        ending = moment.preempted and not now.preempted
        moment = moment._replace(preempted=ending)
        next_one = Decision(any(policy.due(moment) for policy in self._by_rank_0), ending, failure)
        if next_one != Decision():
            self._board.decided = [*self._board.decided[-_REMEMBERED:], (window + 1, next_one)]
        self._board.until = window + 1
        if self._background is not None and self._background.done():
            self._background.result()  # the store may have failed
        self._background = self._engine.submit(self._announce, self._board.topic, msgspec.msgpack.encode(self._board))

    async def _announce(self, topic: str, board: bytes) -> None:
        async with self._lock:  # one after another, so that no older board takes the place of a newer one
            await self._ranks.announce(topic, board)
            self._heard_preempted = self._heard_preempted or await self._ranks.heard("preempted") is not None
            failure = (await self._ranks.heard("failed") or b"").decode()
            self._heard_failure = failure if failure and failure not in self._reported else None

    async def _attend(self, window: int) -> None:
        """Another rank tells what rank 0 cannot know, and fetches what it has decided."""
        if self._preemption is not None and self._preemption.heard is not None:
            await self._tell("preempted", "1")
        failure = self._failure()
        if failure is not None:
            await self._tell("failed", failure)
        await self._fetch(window)

    async def _tell(self, name: str, text: str) -> None:
        if (name, text) not in self._told:
            await self._ranks.announce(name, text.encode())
            self._told.add((name, text))

    async def _fetch(self, window: int) -> None:
        board = self._board
        with anyio.move_on_after(self._ranks.deadline):
            while True:
                data = await self._ranks.heard(board.topic)
                if data is not None:
                    found = msgspec.msgpack.decode(data, type=_Board)
                    board.decided, board.until = found.decided, found.until
                    if board.until >= window:
                        return
                await anyio.sleep(_POLL_SECONDS)
        raise PeerFailed(
            f"rank 0 did not say within {self._ranks.deadline:g} s (option agreement_deadline) whether to save: it "
            "failed, or does not call should_save as the others do",
            rank=0,
        )
