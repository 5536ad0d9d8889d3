"""A LocalStorage whose operating system fails on purpose, at a chosen call: for tests of crashes, in any process."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from asyncdcp.storage.local import LocalStorage
from asyncdcp.storage.posix import OS
from asyncdcp.storage.spec import Fault, FaultySpec

OPERATIONS: Final = (
    *("open", "close", "pwrite", "fallocate", "ftruncate", "fsync"),
    *("link", "unlink", "mkdir", "rmdir", "scan", "rename_noreplace"),
)


class FaultyOS(OS):
    """The real operating system, but for ``faults``. ``kill_trainer`` is called for the action of that name."""

    def __init__(self, faults: Sequence[Fault], kill_trainer: Callable[[], object] = lambda: None) -> None:
        self._faults = faults
        self._kill_trainer = kill_trainer
        self._lock = threading.Lock()
        self.calls: Counter[str] = Counter()
        """How often each operation was called so far; "any" is all together."""
        for operation in OPERATIONS:
            setattr(self, operation, self._faulty(operation, getattr(self, operation)))

    def _faulty(self, operation: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any) -> Any:
            try:
                self._count(operation)
            except OSError:
                if operation == "close":
                    call(*args)  # the number is given up whatever the system answers
                raise
            return call(*args)

        return checked

    def _count(self, operation: str) -> None:
        with self._lock:
            for name in (operation, "any"):
                self.calls[name] += 1
            due = [fault for fault in self._faults if self._is_due(fault, operation)]
        for fault in due:
            self._happen(fault)

    def _is_due(self, fault: Fault, operation: str) -> bool:
        if fault.operation not in (operation, "any"):
            return False
        count = self.calls[fault.operation]
        return count >= fault.number if fault.sticky else count == fault.number

    def _happen(self, fault: Fault) -> None:
        if fault.action == "errno":
            raise OSError(fault.errno, os.strerror(fault.errno))
        if fault.action == "kill-trainer":
            self._kill_trainer()
        else:
            os.kill(os.getpid(), signal.SIGSTOP if fault.action == "stop" else signal.SIGKILL)


class FaultyStorage(LocalStorage):
    """A LocalStorage that is healthy here, and has ``faults`` where its spec is opened."""

    def __init__(self, path: str | os.PathLike[str], faults: Sequence[Fault]) -> None:
        super().__init__(path)
        self._faults = list(faults)

    def spec(self) -> FaultySpec:
        return FaultySpec(os.fsencode(self.info.location), self._faults)
