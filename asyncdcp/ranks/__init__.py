"""Agreements among the ranks of a job: few, small, each with a deadline, and none of them in a repeated save.

``Ranks`` is the port; ``SoleRank`` is a job of one process, ``StoreRanks`` one whose processes share a
``torch.distributed.Store``. No collective of a process group is used, so nothing here can hang one, whichever thread it
runs on. ``Links`` carry what is too much for a store, over connections of their own.
"""

from asyncdcp.ranks.group import find_ranks
from asyncdcp.ranks.links import Links
from asyncdcp.ranks.port import Decide, Ranks, SoleRank, barrier, first_rank, gather
from asyncdcp.ranks.store import StoreRanks
from asyncdcp.ranks.together import leave, together

__all__ = [
    "Decide",
    "Links",
    "Ranks",
    "SoleRank",
    "StoreRanks",
    "barrier",
    "find_ranks",
    "first_rank",
    "gather",
    "leave",
    "together",
]
