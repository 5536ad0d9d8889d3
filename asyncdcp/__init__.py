"""asyncdcp: asyncio-native checkpoints for PyTorch.

Names are imported on first use (PEP 562), so that importing the package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncdcp.checkpointer import AsyncCheckpointer, SaveHandle, SyncCheckpointer
    from asyncdcp.config import Options
    from asyncdcp.errors import AsyncDCPError
    from asyncdcp.futures import CheckpointFuture
    from asyncdcp.manager import CheckpointManager, EverySeconds, EverySteps, OnPreemption, Telemetry, follow
    from asyncdcp.ranks import Ranks, SoleRank
    from asyncdcp.results import LoadReport, Progress, SaveResult, VerifyReport
    from asyncdcp.runs import KeepBest, KeepEvery, KeepLast, list_checkpoints
    from asyncdcp.stateful import PerRank, RNGState, Stateful
    from asyncdcp.storage import LocalStorage, MemoryStorage

_HOMES = {
    "AsyncCheckpointer": "checkpointer",
    "AsyncDCPError": "errors",
    "CheckpointFuture": "futures",
    "CheckpointManager": "manager",
    "EverySeconds": "manager",
    "EverySteps": "manager",
    "KeepBest": "runs",
    "KeepEvery": "runs",
    "KeepLast": "runs",
    "LoadReport": "results",
    "LocalStorage": "storage",
    "MemoryStorage": "storage",
    "OnPreemption": "manager",
    "Options": "config",
    "PerRank": "stateful",
    "Progress": "results",
    "RNGState": "stateful",
    "Ranks": "ranks",
    "SaveHandle": "checkpointer",
    "SaveResult": "results",
    "SoleRank": "ranks",
    "Stateful": "stateful",
    "SyncCheckpointer": "checkpointer",
    "Telemetry": "manager",
    "VerifyReport": "results",
    "follow": "manager",
    "list_checkpoints": "runs",
}

__all__ = [
    "AsyncCheckpointer",
    "AsyncDCPError",
    "CheckpointFuture",
    "CheckpointManager",
    "EverySeconds",
    "EverySteps",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "LoadReport",
    "LocalStorage",
    "MemoryStorage",
    "OnPreemption",
    "Options",
    "PerRank",
    "Progress",
    "RNGState",
    "Ranks",
    "SaveHandle",
    "SaveResult",
    "SoleRank",
    "Stateful",
    "SyncCheckpointer",
    "Telemetry",
    "VerifyReport",
    "follow",
    "list_checkpoints",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'asyncdcp' has no attribute {name!r}")
    value = getattr(import_module(f"asyncdcp.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
