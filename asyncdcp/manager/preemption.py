"""Signals that ask a process to end: heard, passed on to who listened before, and given back."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

from asyncdcp.errors import InvalidOption

_logger = logging.getLogger("asyncdcp.manager")


class Preemption:
    """Listens to signals from ``install`` to ``remove``, on the main thread. ``heard`` is when the first one came, by
    ``time.monotonic``; None until then.

    Handlers that were there are called at once. Nobody is made deaf for good: what no handler was there for is held
    back, and goes on to the system's default, which ends the process, at ``remove`` or once ``patience`` seconds have
    passed since the first signal. That is the first one if nobody has called ``answer`` by then, and any that comes
    later in any case. A second one before that changes nothing: launchers pass on to their processes what the
    scheduler has sent them already. Forked children are not what was asked: there all go on at once.
    """

    def __init__(self, signals: Sequence[signal.Signals], patience: float = 30.0) -> None:
        self.heard: float | None = None
        self.patience = patience
        self._signals = tuple(dict.fromkeys(signals))
        self._held: signal.Signals | None = None
        self._answered = self._removed = False
        self._pid = os.getpid()
        self._wake: Callable[[], object] = lambda: None
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
        """Gives the signals back; one that somebody else has taken over meanwhile stays theirs. Then one that was held
        back, and that nobody has answered, is sent again. Safe to call twice.

        On another thread than the main one it leaves the handlers, which then only pass the signals on.
        """
        self._removed = True
        if threading.current_thread() is threading.main_thread():
            previous, self._previous = self._previous, {}
            for number, handler in previous.items():
                if signal.getsignal(number) is self._handler:
                    signal.signal(number, signal.SIG_DFL if handler is None else handler)
        held, self._held = self._held, None
        if held is not None and os.getpid() == self._pid:
            last_words = "%s ends this process: it came when nobody called should_save any more"
            _logger.error(last_words, held.name, exc_info=sys.exception())  # which may be on its way
            os.kill(self._pid, held)

    def answer(self) -> bool:
        """The program looks whether it is asked to end, and is told so: whether a signal came."""
        if self.heard is not None:
            self.know()
            return True
        return False

    def know(self) -> None:
        """The program knows that it is to end, from a signal or from another rank: one that is held back, or comes
        soon after, has nothing to add.
        """
        self._answered, self._held = True, None

    async def watch(self) -> None:
        """Lets the first signal go on where nobody answers it in time. On asyncio; to be cancelled at the end."""
        came = asyncio.Event()
        self._wake = partial(asyncio.get_running_loop().call_soon_threadsafe, came.set)
        if self.heard is None:
            await came.wait()
        while (left := self._left()) > 0:  # noqa: ASYNC110  # it is the clock that is waited for
            await asyncio.sleep(left)
        if (held := self._held) is not None:
            waited = self.patience
            _logger.error("%s ends this process: should_save was not called within %g s of it", held.name, waited)
            os.kill(self._pid, held)  # to the handler, on the main thread

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.heard is None and os.getpid() == self._pid:
            self.heard = time.monotonic()
            with suppress(RuntimeError):  # its loop has ended
                self._wake()
        before = self._previous.get(signal.Signals(number), signal.SIG_IGN)  # for who still calls it after its end
        if callable(before):
            before(number, frame)
        elif before in (signal.SIG_DFL, None):
            if os.getpid() == self._pid and not self._removed and self._left() > 0:
                self._held = self._held or (None if self._answered else signal.Signals(number))
            else:  # it ends the process, as it would have without this
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)

    def _left(self) -> float:
        return (self.heard or 0.0) + self.patience - time.monotonic()
