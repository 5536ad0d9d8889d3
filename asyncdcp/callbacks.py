"""The thread on which done callbacks run, apart from the engine's loop, so that a slow one delays no work."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextvars import Context

_logger = logging.getLogger(__name__)


class CallbackThread:
    """Runs callables one after another, first in first out, on a thread that lives only while there are any.

    So there is nothing to close, and a callback added after the engine closed still runs.
    """

    def __init__(self, name: str) -> None:
        self.ident: int | None = None
        self._name = name
        self._lock = threading.RLock()
        self._queue: deque[tuple[Context, Callable[[], object]]] = deque()
        self._idle = threading.Event()
        self._idle.set()

    def schedule(self, context: Context, fn: Callable[[], object]) -> None:
        """Run ``fn`` in ``context`` after everything scheduled before."""
        with self._lock:
            self._queue.append((context, fn))
            if not self._idle.is_set():
                return
            self._idle.clear()
            try:
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
            except RuntimeError:  # no more threads: at the limit of the system, or in the last moments of the process
                self._idle.set()
                _logger.exception("%d done callbacks wait: their thread could not be started", len(self._queue))

    def join(self, timeout: float) -> bool:
        """Wait until nothing is left to run; whether that came within ``timeout`` seconds."""
        return self._idle.wait(timeout)

    def _run(self) -> None:
        self.ident = threading.get_ident()
        while True:
            with self._lock:
                if not self._queue:
                    self.ident = None
                    self._idle.set()
                    return
                context, fn = self._queue.popleft()
            try:
                context.run(fn)
            except BaseException:
                # SystemExit too: in a callback it means no more than any other error, and others wait in the queue.
                _logger.exception("a done callback failed")
            del context, fn
