"""Storage and pipeline without threads and without real time: every run is decided by its seed alone."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

import anyio.to_thread

from asyncdcp import threads
from asyncdcp.pipeline import settle

DELAYS: Final = (0.0, 0.0, 0.0, 0.001, 0.02, 0.5, 7.0)
"""Seconds that a call may take where ``rng`` is given: most none, some as long as a slow disk, one a stuck one's."""


@contextmanager
def simulated(rng: random.Random | None = None) -> Iterator[None]:
    """Calls that would go to threads are made on the loop: at once, or after a time that ``rng`` chooses."""

    async def call(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
        await asyncio.sleep(rng.choice(DELAYS) if rng else 0)
        return function(*args)

    async def limited(_limiter: object, function: Callable[..., Any], *args: Any) -> Any:
        return await call(function, *args)

    stand_ins: dict[Any, Any] = {
        threads.on_executor: call,
        threads.on_thread: limited,
        anyio.to_thread: SimpleNamespace(run_sync=call),
    }
    found = [patch.object(module, name, stand_ins[value]) for module, name, value in _calls(len(_modules()))]
    clock = patch.object(settle, "time", SimpleNamespace(time=lambda: 0.0))
    for one in (clock, *found):
        one.start()
    try:
        yield
    finally:
        for one in (clock, *found):
            one.stop()


@cache
def _calls(_modules_there: int) -> list[tuple[ModuleType, str, Any]]:
    """Every name by which what goes to threads is called; found anew where more modules are there."""
    known = (threads.on_executor, threads.on_thread, anyio.to_thread)
    names = ((module, name, value) for module in _modules() for name, value in vars(module).items())
    return [(module, name, value) for module, name, value in names if any(value is one for one in known)]


def _modules() -> list[ModuleType]:
    parts = ("asyncdcp.storage", "asyncdcp.pipeline")
    return [module for name, module in list(sys.modules.items()) if name.startswith(parts) and module is not None]
