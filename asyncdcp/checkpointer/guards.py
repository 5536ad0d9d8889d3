"""The guards of a checkpointer: what they hold back, its pending saves decide."""

from __future__ import annotations

import threading

import torch

from asyncdcp.checkpointer.pending import PendingSaves
from asyncdcp.engine import Engine
from asyncdcp.staging import Guard


class Guards:
    """From any thread. A step waits ``deadline`` seconds for the saves that are under way."""

    def __init__(self, pending: PendingSaves, engine: Engine, deadline: float) -> None:
        self._pending = pending
        self._engine = engine
        self._deadline = deadline
        self._lock = threading.Lock()
        self._guards: list[Guard] = []

    def add(self, optimizers: tuple[torch.optim.Optimizer, ...]) -> Guard:
        """Guards these optimizers, until the guard is removed."""
        guard = Guard(optimizers, self._hold)
        with self._lock:
            self._guards = [*(old for old in self._guards if old.active), guard]
        return guard

    def active(self) -> list[Guard]:
        """Those that were not removed."""
        with self._lock:
            return [guard for guard in self._guards if guard.active]

    def _hold(self) -> None:
        if not self._engine.inherited:  # a forked child steps its own copy of the tensors, and no save is its own
            self._pending.hold(self._deadline)
