"""Work for an engine, how long a test waits for it, and time that passes when the test says so."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
from contextlib import suppress

import anyio

from asyncdcp.engine import Engine

LONG = 150.0  # a deadline that only a failing test reaches: a cold cache makes importing torch take half a minute


async def add(a: int, b: int) -> int:
    return a + b


async def fail(message: str) -> None:
    raise ValueError(message)


async def forever() -> None:
    await anyio.sleep_forever()


def leap(seconds: float) -> None:
    """So much time passes at once on the clock of the running loop, and on no other. A long deadline is missed by it
    when the test is ready for that; a short one is missed whenever the machine is busy.
    """
    loop = asyncio.get_running_loop()
    time = loop.time
    loop.time = lambda: time() + seconds  # type: ignore[method-assign]  # the one that its timers look at


def let_pass(engine: Engine, seconds: float) -> None:
    """``leap`` on the engine's loop."""
    engine.call(leap, seconds)


def free_port() -> int:
    """A port that nobody has, nor gets meanwhile by asking for any: the system gives out those from 32,768 on."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


def open_descriptors() -> set[str]:
    """This process's, but for those that other tests have left to the garbage collector. What these have left to a
    thread may go at any time: at the end of a test there are no others than before, and there may be fewer.
    """
    gc.collect()
    return set(os.listdir("/proc/self/fd"))
