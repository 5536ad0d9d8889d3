"""The end of a manager: reached once, by whoever closes it first."""

from __future__ import annotations

import threading
from collections.abc import Callable

from asyncdcp.engine import Engine
from asyncdcp.errors import WouldDeadlock


class Ending:
    """``begun`` once somebody closes, ``over`` once that has ended, well or not.

    ``engines`` end by it: their threads, and the done callbacks that run there, cannot wait for it.
    """

    def __init__(self, *engines: Engine) -> None:
        self.begun = False
        self.over = threading.Event()
        self._engines = engines
        self._lock = threading.RLock()  # reentrant: a signal's handler may close in the middle of a close
        self._closer: int | None = None

    def reach(self, close: Callable[[], None]) -> None:
        """Calls ``close`` if this is the first call, else waits until the first has ended; but not where that waits for
        the caller, in the middle of it or in a done callback. There a first call is refused: ``WouldDeadlock``.
        """
        on_engine = any(engine.owns_current_thread() for engine in self._engines)
        if self._is_first(on_engine=on_engine):
            try:
                close()
            finally:
                self.over.set()
        elif not on_engine and self._closer != threading.get_ident():
            self.over.wait()

    def _is_first(self, *, on_engine: bool) -> bool:
        with self._lock:
            if self.begun:
                return False
            if on_engine:
                raise WouldDeadlock("close() in a done callback would wait for that very callback")
            self._closer = threading.get_ident()  # before the next line, for a handler that comes in between
            self.begun = True
            return True
