"""asyncdcp, the subject of the matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from asyncdcp import AsyncCheckpointer, SaveHandle


class _Own:
    needs: ClassVar[str] = "asyncdcp"
    runs_a_loop: ClassVar[bool] = False
    process: ClassVar[bool]

    def __init__(self, source: Any, target: Any) -> None:
        self._source, self._target = source, target
        self._checkpointer = AsyncCheckpointer(process=self.process)
        self._checkpointer.prepare(source).result()
        self._handle: SaveHandle | None = None

    @property
    def handle(self) -> SaveHandle:
        """Of the last save."""
        assert self._handle is not None
        return self._handle

    def begin(self, folder: Path) -> None:
        self._handle = self._checkpointer.save(folder, self._source)

    def staged(self) -> None:
        self.handle.staged.result()

    def done(self) -> bool:
        return self.handle.done()

    def finish(self) -> None:
        self.handle.result()

    def load(self, folder: Path) -> None:
        self._checkpointer.load(folder, self._target).result()

    def close(self) -> None:
        self._checkpointer.close()


class OwnProcess(_Own):
    """With the background process, the default."""

    key: ClassVar[str] = "process"
    name: ClassVar[str] = "asyncdcp"
    process = True


class OwnThread(_Own):
    """With the pipeline on a thread of the trainer's."""

    key: ClassVar[str] = "thread"
    name: ClassVar[str] = "asyncdcp, thread"
    process = False
