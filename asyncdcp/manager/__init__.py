"""A run's checkpoints by steps: when to save, what to keep, where to go on from."""

from asyncdcp.manager.following import Published, follow
from asyncdcp.manager.manager import CheckpointManager
from asyncdcp.manager.policies import EverySeconds, EverySteps, Moment, OnPreemption, SavePolicy, When
from asyncdcp.manager.telemetry import Event, Telemetry

__all__ = [
    "CheckpointManager",
    "Event",
    "EverySeconds",
    "EverySteps",
    "Moment",
    "OnPreemption",
    "Published",
    "SavePolicy",
    "Telemetry",
    "When",
    "follow",
]
