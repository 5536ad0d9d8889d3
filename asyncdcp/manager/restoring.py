"""Restoring: rank 0 says which checkpoint, every rank loads it, and all of them go by what all of them came to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, TypeVar

import msgspec
from anyio import move_on_after

from asyncdcp.errors import (
    AsyncDCPError,
    CheckpointNotFound,
    CorruptCheckpoint,
    PeerError,
    PeerFailed,
    StorageError,
    StorageUnavailable,
    UnsupportedFormat,
    in_words,
)
from asyncdcp.ranks import Ranks, together
from asyncdcp.runs import Checkpoint

T = TypeVar("T")

Load = Callable[[Checkpoint], Awaitable[None]]
OnDamage = Callable[[Checkpoint, AsyncDCPError, list[Checkpoint]], Awaitable[list[Checkpoint]]]
"""What to try after a candidate that is damaged, and why, and those that are left; alike on all ranks."""

_LAST_WORD_SECONDS: Final = 5.0


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
    except BaseException as error:
        with move_on_after(_LAST_WORD_SECONDS, shield=True), suppress(PeerError):
            await ranks.broadcast(topic, msgspec.msgpack.encode(_Word(in_words(error))))
        raise
    await ranks.broadcast(topic, msgspec.msgpack.encode(_Word(data=msgspec.json.encode(value))))
    return value


async def chosen(
    ranks: Ranks, topic: str, work: Callable[[], Awaitable[T]], type_: type[T], *, deadline: float | None = None
) -> T:
    """As ``said``, but for all ranks do ``work``, and none goes on unless it went well on each: one that fails or is
    cancelled fails the others at once. Rank 0's counts. ``deadline`` is for work that takes long.
    """

    async def tell() -> bytes:
        return msgspec.json.encode(await work())

    try:
        return msgspec.json.decode(await together(ranks, topic, tell, deadline=deadline), type=type_)
    except AsyncDCPError as error:
        if ranks.rank == 0 or error.rank != 0 or isinstance(error, PeerError):
            raise
        raise PeerFailed(f"rank 0: {type(error).__name__}: {error}", rank=0) from error


async def load_first(
    ranks: Ranks, topic: str, candidates: Sequence[Checkpoint], load: Load, on_damage: OnDamage
) -> Checkpoint | None:
    """The first candidate that every rank could load; None if there are no candidates.

    Damage on any rank (bytes that do not verify, files that are gone or cannot be read) makes all go on to what
    ``on_damage`` says; any other error is raised on all, as is the first damage if nothing is left. Where one is
    cancelled, all others fail (``PeerFailed``) as soon as they have loaded, or could not.
    """
    first: AsyncDCPError | None = None
    found: tuple[AsyncDCPError, bool] | None = None
    tried: dict[int, None] = {}
    left = list(candidates)
    try:
        while left:
            candidate, *older = left
            found = await _loaded(ranks, topic, partial(load, candidate))
            if found is None:
                return candidate
            if not found[1]:
                raise found[0]
            first = first or found[0]
            tried[candidate.step] = None
            left = await on_damage(candidate, found[0], older)
        if first is not None:
            if len(tried) > 1:
                first.add_note(f"and no older checkpoint could be loaded: {[*tried]} were tried")
            raise first
        return None
    finally:
        del first, found  # whose tracebacks have this


async def _loaded(ranks: Ranks, topic: str, load: Callable[[], Awaitable[None]]) -> tuple[AsyncDCPError, bool] | None:
    """None if all ranks have loaded; else the error to go by, this rank's own first, and whether it is damage to all
    ranks that have one.
    """
    error: AsyncDCPError | None = None

    async def tell() -> bytes:
        nonlocal error
        try:
            await load()
        except AsyncDCPError as known:
            error = known
            return msgspec.msgpack.encode(_Outcome(in_words(known), _is_damage(known)))
        return msgspec.msgpack.encode(_Outcome())

    words = msgspec.msgpack.decode(await together(ranks, topic, tell, msgspec.msgpack.encode), type=list[bytes])
    told = [msgspec.msgpack.decode(word, type=_Outcome) for word in words]
    failed = {rank: outcome for rank, outcome in enumerate(told) if outcome.error is not None}
    if not failed:
        return None
    damage = all(outcome.damage for outcome in failed.values())
    own, error = error, None  # its traceback has what tells
    if own is not None:
        return own, damage
    rank, outcome = next(iter(failed.items()))
    return PeerFailed(f"rank {rank} could not load: {outcome.error}", rank=rank), damage


def _is_damage(error: AsyncDCPError) -> bool:
    """A peer's failure within a load that all ranks make together is that of the peer, which tells for itself. What
    only lacks an extension, a package, descriptors or a right here, or lies in a store that does not answer, is whole:
    an older checkpoint in its place would lose progress.
    """
    kinds = (CorruptCheckpoint, CheckpointNotFound, StorageError, PeerError)
    return isinstance(error, kinds) and not isinstance(error, UnsupportedFormat | StorageUnavailable)
