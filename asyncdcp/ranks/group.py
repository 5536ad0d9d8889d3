"""Which ranks there are: those of a process group, or this process alone."""

from __future__ import annotations

import hashlib
import os
from typing import Final

import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store  # type: ignore[attr-defined]  # torch exports them without saying so

from asyncdcp.errors import InvalidOption, UsageError
from asyncdcp.ranks.keys import own_connection
from asyncdcp.ranks.port import Ranks, SoleRank
from asyncdcp.ranks.store import StoreRanks

_NON_MEMBER: Final[object] = dist.GroupMember.NON_GROUP_MEMBER
"""What ``new_group()`` gives to processes that are not in it."""
_NOT_IN_IT: Final = (
    "this process is not one of the process_group that was given: make no checkpointer here, or one that works alone, "
    "with process_group=SoleRank()"
)


def find_ranks(
    process_group: ProcessGroup | Ranks | None, deadline: float, option: str = "option agreement_deadline"
) -> Ranks:
    """The ranks of ``process_group``, None being the default group; ``SoleRank`` where torch.distributed is not in use.

    ``UsageError`` where a launcher has started several processes and there is no process group yet, and where this
    process is not in the group. Waits for nobody; the first of the ranks' calls waits for all (``StoreRanks``).
    """
    if process_group is not None and not isinstance(process_group, ProcessGroup):
        if process_group == _NON_MEMBER:
            raise UsageError(_NOT_IN_IT)
        if not hasattr(process_group, "world_size"):
            raise InvalidOption(f"process_group takes a ProcessGroup of torch, or Ranks, not {process_group!r:.80}")
        return process_group
    if not (dist.is_available() and dist.is_initialized()):
        world = os.environ.get("WORLD_SIZE", "1")
        if world.isdecimal() and int(world) > 1:
            raise UsageError(
                f"this is one of {world} processes (WORLD_SIZE), and there is no process group yet: call "
                "torch.distributed.init_process_group() before making a checkpointer, or say that this process "
                "works alone, with process_group=SoleRank()"
            )
        return SoleRank()
    group = dist.group.WORLD if process_group is None else process_group  # torch 2.6 takes no None for ranks
    assert group is not None
    rank, members = dist.get_rank(group), dist.get_process_group_ranks(group)
    if rank < 0:
        raise UsageError(_NOT_IN_IT)
    if len(members) == 1:
        return SoleRank()
    name = hashlib.blake2b(repr((_name(process_group), members, option)).encode(), digest_size=8).hexdigest()
    store = PrefixStore(f"asyncdcp/{name}", own_connection(_default_store()))
    return StoreRanks(store, rank, len(members), deadline=deadline, option=option, meets=True)


def _name(group: ProcessGroup | None) -> str:
    return "" if group is None else str(group.group_name)


def _default_store() -> Store:
    """The store by which the processes have met. torch has no public name for it, and has had this one since 1.8."""
    store: Store = dist.distributed_c10d._get_default_store()
    return store
