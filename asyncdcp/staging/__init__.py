"""Staging: the copy of a state's tensors into the arena, laid out as the data files will be."""

from asyncdcp.staging.arenas import Arenas, StagingArena
from asyncdcp.staging.copier import SlabCopier
from asyncdcp.staging.guard import EagerBudget, Guard
from asyncdcp.staging.stager import CheckpointStager, Sources

__all__ = ["Arenas", "CheckpointStager", "EagerBudget", "Guard", "SlabCopier", "Sources", "StagingArena"]
