"""The cases of README's table of errors: how one is added, and what many of them do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asyncdcp import CheckpointManager, MemoryStorage, SyncCheckpointer
from asyncdcp.storage import MemoryPlace

CASES: list[tuple[str, str, Callable[[], object]]] = []
"""Section, cause, and what raises the error."""


def case(section: str, cause: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Adds a row."""

    def add(make: Callable[[], object]) -> Callable[[], object]:
        CASES.append((section, cause, make))
        return make

    return add


def save(state: Any, **options: Any) -> MemoryStorage:
    """A storage that holds a checkpoint of ``state``."""
    storage = MemoryStorage("run/step_9")
    with SyncCheckpointer(process=False) as checkpointer:
        checkpointer.save(storage, state, **options)
    return storage


def load(storage: MemoryStorage, *target: Any, **options: Any) -> Any:
    with SyncCheckpointer(process=False) as checkpointer:
        return checkpointer.load(storage, *target, **options)


def managed(place: MemoryPlace, **options: Any) -> CheckpointManager:
    return CheckpointManager(place, process=False, takeover_seconds=0, **options)
