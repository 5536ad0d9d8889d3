"""Transfers take turns: between two ranks and in one direction there is one at a time, in the order of the calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

import anyio


class Turns:
    """On one loop."""

    def __init__(self) -> None:
        self._locks: dict[tuple[str, int], anyio.Lock] = {}

    @asynccontextmanager
    async def of(self, direction: str, ranks: Iterable[int]) -> AsyncIterator[None]:
        """The turn with all of ``ranks``; taken in ascending order, so that nobody waits in a circle."""
        async with AsyncExitStack() as stack:
            for rank in sorted(ranks):
                await stack.enter_async_context(self._locks.setdefault((direction, rank), anyio.Lock()))
            yield
