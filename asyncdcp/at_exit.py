"""What is still under way when the interpreter exits, and is waited for."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401  # registers its own exit function when imported: before ours
import threading
from collections.abc import Callable
from typing import Protocol

from asyncdcp.errors import Closed


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
