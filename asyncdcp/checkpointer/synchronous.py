"""SyncCheckpointer: the same verbs for programs without an event loop, each waiting for its result."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TypeVar, overload

import torch

from asyncdcp.checkpointer.asynchronous import AsyncCheckpointer, OnProgress, Place
from asyncdcp.config import Options
from asyncdcp.results import SaveResult

StateT = TypeVar("StateT")


class SyncCheckpointer:
    """``AsyncCheckpointer`` with ``.result()`` after every verb: arguments, guarantees and errors are the same."""

    def __init__(self, options: Options | None = None) -> None:
        self._inner = AsyncCheckpointer(options)

    def save(
        self,
        path: Place,
        state_dict: Mapping[Any, Any],
        *,
        overwrite: bool = False,
        metadata: Mapping[str, Any] | None = None,
        on_progress: OnProgress | None = None,
    ) -> SaveResult:
        """Saves, and returns when the checkpoint is durable."""
        return self._inner.save(
            path, state_dict, overwrite=overwrite, metadata=metadata, on_progress=on_progress
        ).result()

    def prepare(self, state_dict: Mapping[Any, Any]) -> None:
        """Takes the arena's memory ahead, and returns when it is there."""
        self._inner.prepare(state_dict).result()

    @overload
    def load(
        self, path: Place, state: None = None, *, strict: bool = True, device: torch.device | str = "cpu"
    ) -> Any: ...

    @overload
    def load(
        self, path: Place, state: StateT, *, strict: bool = True, device: torch.device | str = "cpu"
    ) -> StateT: ...

    def load(self, path: Place, state: Any = None, *, strict: bool = True, device: torch.device | str = "cpu") -> Any:
        """Loads, and returns the state: the given one, filled, or a new one."""
        return self._inner.load(path, state, strict=strict, device=device).result()

    def close(self) -> None:
        """Ends the engine."""
        self._inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, traceback)
