"""What is closed in the end: as a context manager, plain or async, and at the interpreter's exit."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import ClassVar, Self
from weakref import WeakMethod

from asyncdcp.threads import uncut

_logger = logging.getLogger("asyncdcp")


class Closing(ABC):
    """``close``, and all ways to call it. Where a block ends by an error, that of closing is logged and noted on it."""

    _noun: ClassVar[str]
    """What it is, in the words of that note."""

    @abstractmethod
    def close(self) -> None:
        """Waits for what is pending, and ends all threads; safe to call twice."""

    async def aclose(self) -> None:
        """``close`` for coroutines: the loop goes on meanwhile. Not cut short by cancellation."""
        try:
            await uncut(self.close)
        finally:
            self._back_on_thread()

    def _back_on_thread(self) -> None:  # noqa: B027  # most have nothing to do there
        """What can be done on the caller's thread only, after ``close`` was called on another one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            _logger.exception("closing failed while another error is on its way")
            error.add_note(f"and closing the {self._noun} failed: {failure}")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await uncut(partial(self.__exit__, kind, error, traceback))
        finally:
            self._back_on_thread()


def weakly(method: Callable[[], object]) -> Callable[[], None]:
    """Calls a bound method as long as its object is there, and does not keep it."""
    held = WeakMethod(method)

    def call() -> None:
        if (found := held()) is not None:
            found()

    return call
