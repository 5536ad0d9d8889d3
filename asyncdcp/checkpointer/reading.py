"""A verb that reads a checkpoint, on the engine's loop: one future, cancellation and a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import anyio

from asyncdcp.engine import Engine
from asyncdcp.errors import AsyncDCPError, Cancelled, DeadlineExceeded, reading
from asyncdcp.futures import CheckpointFuture

T = TypeVar("T")


class ReadTask(Generic[T]):
    """Carries ``work`` out on the engine's loop; ``future`` resolves to the first of what it returns, with the second
    at its ``report``. ``verb`` is "load" or "verify", ``hint`` more to say where it is late.
    """

    def __init__(self, verb: str, path: str, work: Callable[[], Awaitable[tuple[T, object]]], engine: Engine) -> None:
        self._what = f"{verb} of {path}"
        self._path = path
        self._work = work
        self._scope: anyio.CancelScope | None = None
        self._given_up = False
        self.future: CheckpointFuture[T] = engine.future(self._what, cancel=self._cancel)

    async def run(self, deadline: float, hint: str = "") -> None:
        """Never raises but for cancellation, at the engine's end."""
        timer = asyncio.get_running_loop().call_later(deadline, self._expire, deadline, hint)
        try:
            with anyio.CancelScope() as self._scope:
                if self._given_up:
                    self._scope.cancel()
                with reading(self._path):
                    value, self.future.report = await self._work()
                self.future.resolve(value)
        except AsyncDCPError as error:
            self.future.fail(error)
        except Exception as error:  # noqa: BLE001  # it belongs to whoever awaits the future
            known = AsyncDCPError(f"the {self._what} failed: {type(error).__name__}: {error}", path=self._path)
            known.__cause__ = error
            self.future.fail(known)
        finally:
            timer.cancel()
            self.future.fail(Cancelled(f"the {self._what} was cancelled", path=self._path))

    def _cancel(self) -> None:
        self._given_up = True
        if self._scope is not None:
            self._scope.cancel()

    def _expire(self, deadline: float, hint: str) -> None:
        """A read that never returns must not keep the caller: the future fails now, the read is left to end when it
        can.
        """
        message = f"the {self._what} was not done within {deadline:g} s (option load_deadline){hint}"
        self.future.fail(DeadlineExceeded(message, path=self._path))
        self._cancel()
