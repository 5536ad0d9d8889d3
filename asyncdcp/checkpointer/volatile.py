"""The warning that checkpoints will not outlive the machine's next restart."""

from __future__ import annotations

from asyncdcp.errors import VolatileStorageWarning
from asyncdcp.storage import MemoryStorage, Storage
from asyncdcp.warn import warn_caller


class VolatileWarnings:
    """Of one checkpointer, which warns once of each filesystem that is kept in memory."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def warn_of(self, storage: Storage) -> None:
        """On the thread of the verb that a user has called, and by that verb itself."""
        info = storage.info
        if isinstance(storage, MemoryStorage):
            return  # whoever hands that over knows
        if info.volatile and info.filesystem not in self._told:
            self._told.add(info.filesystem)
            warn_caller(
                f"{info.location} is kept in memory ({info.filesystem}): checkpoints there do not survive "
                "a restart of the machine",
                VolatileStorageWarning,
            )
