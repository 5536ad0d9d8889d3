"""Signals that ask a process to end: heard, passed on to who listened before, and given back."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from asyncdcp.errors import InvalidOption


class Preemption:
    """Listens to signals from ``install`` to ``remove``, on the main thread. ``heard`` is when the first one came, by
    ``time.monotonic``; None until then.
    """

    def __init__(self, signals: Sequence[signal.Signals]) -> None:
        self.heard: float | None = None
        self._signals = tuple(dict.fromkeys(signals))
        self._previous: dict[signal.Signals, Any] = {}
        self._handler: Callable[[int, FrameType | None], None] = self._handle  # one object, to be known again

    def install(self) -> None:
        """Takes the signals over. ``InvalidOption`` on any thread but the main one: no other can."""
        if self._previous:
            return
        if threading.current_thread() is not threading.main_thread():
            raise InvalidOption("OnPreemption needs a manager that is opened on the main thread: no other gets signals")
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._handler)

    def remove(self) -> None:
        """Gives the signals back; one that somebody else has taken over meanwhile stays theirs. Safe to call twice.

        On another thread than the main one it leaves the handlers, which then only pass the signals on.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        previous, self._previous = self._previous, {}
        for number, handler in previous.items():
            if signal.getsignal(number) is self._handler:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.heard is None:
            self.heard = time.monotonic()
        before = self._previous.get(signal.Signals(number))
        if callable(before):
            before(number, frame)
