"""Staging: the copy of a state's tensors into the arena, laid out as the data files will be."""

from asyncdcp.staging.accelerator import DeviceFence
from asyncdcp.staging.arenas import Arenas, StagingArena
from asyncdcp.staging.copier import SlabCopier
from asyncdcp.staging.stager import CheckpointStager

__all__ = ["Arenas", "CheckpointStager", "DeviceFence", "SlabCopier", "StagingArena"]
