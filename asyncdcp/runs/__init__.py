"""A run on its storage, without torch: its checkpoints and their lineage, what is kept, what may go."""

from asyncdcp.runs.collection import Leftover, collect, plan_collection
from asyncdcp.runs.history import Saved, read_history
from asyncdcp.runs.layout import Line
from asyncdcp.runs.listing import Checkpoint, Run, list_checkpoints, look
from asyncdcp.runs.retention import AllOf, AnyOf, KeepBest, KeepEvery, KeepLast, Retention, to_delete

__all__ = [
    "AllOf",
    "AnyOf",
    "Checkpoint",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "Leftover",
    "Line",
    "Retention",
    "Run",
    "Saved",
    "collect",
    "list_checkpoints",
    "look",
    "plan_collection",
    "read_history",
    "to_delete",
]
