"""Work for an engine, and how long a test waits for it."""

from __future__ import annotations

import anyio

LONG = 150.0  # a deadline that only a failing test reaches: a cold cache makes importing torch take half a minute


async def add(a: int, b: int) -> int:
    return a + b


async def fail(message: str) -> None:
    raise ValueError(message)


async def forever() -> None:
    await anyio.sleep_forever()
