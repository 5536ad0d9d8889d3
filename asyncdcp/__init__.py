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
    from asyncdcp.extensions import (
        AESGCM,
        BlockContext,
        BlockExtension,
        BytePlanes,
        Extension,
        ExtensionRegistry,
        StreamTransformExtension,
        ZStandard,
    )
    from asyncdcp.futures import CheckpointFuture
    from asyncdcp.manager import CheckpointManager, EverySeconds, EverySteps, OnPreemption, Published, Telemetry, follow
    from asyncdcp.ranks import Ranks, SoleRank
    from asyncdcp.results import LoadReport, Progress, SaveResult, VerifyReport
    from asyncdcp.runs import Checkpoint, KeepBest, KeepEvery, KeepLast
    from asyncdcp.stateful import PerRank, RNGState, Stateful
    from asyncdcp.storage import LocalStorage, MemoryStorage
    from asyncdcp.storage.object_store import ObjectStorage as ObjectStorage
    from asyncdcp.train_state import TrainState
    from asyncdcp.transport import PGTransport, TransportOptions, recover

_HOMES = {
    "AESGCM": "extensions",
    "AsyncCheckpointer": "checkpointer",
    "AsyncDCPError": "errors",
    "BlockContext": "extensions",
    "BlockExtension": "extensions",
    "BytePlanes": "extensions",
    "Checkpoint": "runs",
    "CheckpointFuture": "futures",
    "CheckpointManager": "manager",
    "EverySeconds": "manager",
    "EverySteps": "manager",
    "Extension": "extensions",
    "ExtensionRegistry": "extensions",
    "KeepBest": "runs",
    "KeepEvery": "runs",
    "KeepLast": "runs",
    "LoadReport": "results",
    "LocalStorage": "storage",
    "MemoryStorage": "storage",
    "ObjectStorage": "storage",
    "OnPreemption": "manager",
    "Options": "config",
    "PGTransport": "transport",
    "PerRank": "stateful",
    "Progress": "results",
    "Published": "manager",
    "RNGState": "stateful",
    "Ranks": "ranks",
    "SaveHandle": "checkpointer",
    "SaveResult": "results",
    "SoleRank": "ranks",
    "Stateful": "stateful",
    "StreamTransformExtension": "extensions",
    "SyncCheckpointer": "checkpointer",
    "Telemetry": "manager",
    "TrainState": "train_state",
    "TransportOptions": "transport",
    "VerifyReport": "results",
    "ZStandard": "extensions",
    "follow": "manager",
    "recover": "transport",
}

# ObjectStorage is not among them: it takes an extra, without which ``from asyncdcp import *`` would fail.
__all__ = [
    "AESGCM",
    "AsyncCheckpointer",
    "AsyncDCPError",
    "BlockContext",
    "BlockExtension",
    "BytePlanes",
    "Checkpoint",
    "CheckpointFuture",
    "CheckpointManager",
    "EverySeconds",
    "EverySteps",
    "Extension",
    "ExtensionRegistry",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "LoadReport",
    "LocalStorage",
    "MemoryStorage",
    "OnPreemption",
    "Options",
    "PGTransport",
    "PerRank",
    "Progress",
    "Published",
    "RNGState",
    "Ranks",
    "SaveHandle",
    "SaveResult",
    "SoleRank",
    "Stateful",
    "StreamTransformExtension",
    "SyncCheckpointer",
    "Telemetry",
    "TrainState",
    "TransportOptions",
    "VerifyReport",
    "ZStandard",
    "follow",
    "recover",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'asyncdcp' has no attribute {name!r}")
    value = getattr(import_module(f"asyncdcp.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
