"""Restoring: rank 0 says which checkpoint, every rank loads it, and all of them go by what all of them came to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec

from asyncdcp.errors import (
    AsyncDCPError,
    CheckpointNotFound,
    CorruptCheckpoint,
    PeerError,
    PeerFailed,
    StorageError,
    UnsupportedFormat,
)
from asyncdcp.ranks import Ranks, gather
from asyncdcp.runs import Checkpoint

T = TypeVar("T")

Load = Callable[[Checkpoint], Awaitable[None]]
OnDamage = Callable[[Checkpoint, AsyncDCPError], None]


class _Word(msgspec.Struct):
    """What rank 0 says: a value, or the error that kept it from one."""

    error: str | None = None
    data: bytes = b""


class _Outcome(msgspec.Struct):
    """What a rank's load came to. ``damage``: it is the checkpoint's fault, so that an older one may do."""

    error: str | None = None
    damage: bool = False


async def said(ranks: Ranks, topic: str, work: Callable[[], Awaitable[T]], type_: type[T]) -> T:
    """What ``work`` comes to on rank 0, on every rank. An error of it is raised there, and elsewhere ``PeerFailed``. It
    goes as JSON, as Records do, in whose metadata integers may have any size.
    """
    if ranks.rank:
        word = msgspec.msgpack.decode(await ranks.broadcast(topic, None), type=_Word)
        if word.error is not None:
            raise PeerFailed(f"rank 0: {word.error}", rank=0)
        return msgspec.json.decode(word.data, type=type_)
    try:
        value = await work()
    except Exception as error:
        await ranks.broadcast(topic, msgspec.msgpack.encode(_Word(f"{type(error).__name__}: {error}")))
        raise
    await ranks.broadcast(topic, msgspec.msgpack.encode(_Word(data=msgspec.json.encode(value))))
    return value


async def load_first(
    ranks: Ranks, candidates: Sequence[Checkpoint], load: Load, on_damage: OnDamage
) -> Checkpoint | None:
    """The first candidate that every rank could load; None if there are no candidates.

    Damage on any rank (bytes that do not verify, files that are gone or cannot be read) makes all go on to the next,
    and ``on_damage`` hears of it; any other error is raised on all, as is the first damage if nothing is left.
    """
    first: AsyncDCPError | None = None
    for candidate in candidates:
        error = await _try(load, candidate)
        found = await _gathered(ranks, error)
        if found is None:
            return candidate
        known, damage = found
        if not damage:
            raise known
        on_damage(candidate, known)
        first = first or known
    if first is not None:
        first.add_note(f"and no older checkpoint could be loaded: {[each.step for each in candidates]} were tried")
        raise first
    return None


async def _try(load: Load, candidate: Checkpoint) -> AsyncDCPError | None:
    try:
        await load(candidate)
    except AsyncDCPError as error:
        return error
    return None


async def _gathered(ranks: Ranks, error: AsyncDCPError | None) -> tuple[AsyncDCPError, bool] | None:
    """None if all ranks have loaded; else the error to go by, this rank's own first, and whether it is damage to all
    ranks that have one.
    """
    own = _Outcome() if error is None else _Outcome(f"{type(error).__name__}: {error}", _is_damage(error))
    told = [
        msgspec.msgpack.decode(each, type=_Outcome)
        for each in await gather(ranks, "restored", msgspec.msgpack.encode(own))
    ]
    failed = {rank: outcome for rank, outcome in enumerate(told) if outcome.error is not None}
    if not failed:
        return None
    damage = all(outcome.damage for outcome in failed.values())
    if error is not None:
        return error, damage
    rank, outcome = next(iter(failed.items()))
    return PeerFailed(f"rank {rank} could not load: {outcome.error}", rank=rank), damage


def _is_damage(error: AsyncDCPError) -> bool:
    """A peer's failure within a load that all ranks make together is that of the peer, which tells for itself. What
    only lacks an extension or a package here is whole: an older checkpoint in its place would lose progress.
    """
    kinds = (CorruptCheckpoint, CheckpointNotFound, StorageError, PeerError)
    return isinstance(error, kinds) and not isinstance(error, UnsupportedFormat)
