"""Who writes what where, and what a load reads. Pure functions of names, shapes and boxes; no tensors, no I/O."""

from asyncdcp.planning.load_plan import LoadPlan, ReadItem, Want, plan_load
from asyncdcp.planning.save_plan import (
    ChunkSpec,
    Piece,
    PlanCache,
    SavePlan,
    Slab,
    Structure,
    TensorSpec,
    plan_save,
)

__all__ = [
    "ChunkSpec",
    "LoadPlan",
    "Piece",
    "PlanCache",
    "ReadItem",
    "SavePlan",
    "Slab",
    "Structure",
    "TensorSpec",
    "Want",
    "plan_load",
    "plan_save",
]
