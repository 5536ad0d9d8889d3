"""What is closed in the end: at the end of a block, plain or async; and what still runs when the interpreter exits."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401  # registers its own exit function when imported: before ours
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import ClassVar, Protocol, Self
from weakref import WeakMethod

from asyncdcp.errors import Closed
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


class Running(Protocol):
    """An engine, as the exit sees it."""

    name: str

    def finish(self) -> None:
        """Ends it, with a deadline. Raises nothing."""
        ...


class ExitHook:
    """The engines that run, the newest last; finishes them when the interpreter exits, the newest first.

    It must run while threads can be started and executors take work. ``atexit`` is too late: by then threads were
    joined and ``concurrent.futures`` refuses work. ``threading._register_atexit`` (3.9–3.14, private) calls its
    functions last in, first out at the head of ``threading._shutdown``, before any join. ``concurrent.futures.thread``
    registers its own refusal when it is imported, which is above, so ours comes before it.

    - 3.11: tested here.
    - 3.12.0–3.12.2 refuse any new thread from the beginning of finalization on, so that work which needs one at exit
      fails with RuntimeError, loudly (gh-113964, mended in 3.12.3).
    - 3.12.3–3.14 refuse it from after ``threading._shutdown``: as 3.11. In 3.13 ``_shutdown`` joins in C, yet calls
      these functions first all the same. In 3.14 a daemon thread that outlives the interpreter is parked for good
      instead of ended; both concern only work that was given up.

    A thread of the user that goes on after the main thread has ended finds its engines closed, as it finds
    ``concurrent.futures``. A child by ``os.fork()`` inherits the hook and skips its parent's engines.
    """

    def __init__(self) -> None:
        self._engines: dict[Running, None] = {}  # no lock: single dict operations, and a fork may not leave one held
        self._installed = False

    def add(self, engine: Running) -> None:
        if not self._installed:
            register: Callable[[Callable[[], None]], object] = getattr(threading, "_register_atexit", atexit.register)
            try:
                register(self._run)
            except RuntimeError as error:
                raise Closed(f"{engine.name} cannot start: the interpreter is exiting") from error
            self._installed = True
        self._engines[engine] = None

    def remove(self, engine: Running) -> None:
        self._engines.pop(engine, None)

    def _run(self) -> None:
        while self._engines:
            engine, _ = self._engines.popitem()
            self._engines[engine] = None  # finished engines remove themselves; until then they count as running
            engine.finish()
            self._engines.pop(engine, None)


exit_hook = ExitHook()  # the one module global: the interpreter's exit is one per process
