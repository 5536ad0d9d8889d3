"""Work that all ranks do, and that went well only if it did on each of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import msgspec
from anyio import move_on_after

from asyncdcp.errors import AsyncDCPError, Cancelled, PeerFailed
from asyncdcp.ranks.port import Decide, Ranks, first_rank
from asyncdcp.worker.failures import from_frame, to_frame
from asyncdcp.worker.protocol import ErrorFrame

_LAST_WORD_SECONDS = 5.0
_CANCELLED = "it was cancelled"


class _Outcome(msgspec.Struct):
    data: bytes = b""
    error: ErrorFrame | None = None


async def together(
    ranks: Ranks,
    topic: str,
    work: Callable[[], Awaitable[bytes]],
    decide: Decide = first_rank,
    *,
    deadline: float | None = None,
) -> bytes:
    """Does ``work`` here, and returns what rank 0 decides of what it came to on all ranks.

    Where it failed on one, the error is raised on all: there as it is, and elsewhere as the same class with a message
    that names the rank, for others can go on from it in the same way. A rank that only knows that a peer failed
    (``PeerFailed``) raises what all have agreed on, which is what failed the peer; it waits for the others as long as
    for any agreement, and no longer. A rank that is cancelled meanwhile fails all others at once (``PeerFailed``).
    """
    if ranks.world_size == 1:
        return decide([await work()])
    failure: AsyncDCPError | None = None
    try:
        told = _Outcome(await work())
    except AsyncDCPError as error:
        failure, told = error, _Outcome(error=to_frame(error, with_traceback=False))
    except BaseException as error:
        await _leave(ranks, topic, error)
        raise

    def judge(outcomes: Sequence[bytes]) -> bytes:
        found = [msgspec.msgpack.decode(outcome, type=_Outcome) for outcome in outcomes]
        failed = [(rank, outcome.error) for rank, outcome in enumerate(found) if outcome.error is not None]
        if failed:
            raise _root(failed)
        return decide([outcome.data for outcome in found])

    limit = None if isinstance(failure, PeerFailed) else deadline
    try:
        return await ranks.decide(topic, msgspec.msgpack.encode(told), judge, deadline=limit)
    except AsyncDCPError as error:
        if failure is not None and not isinstance(failure, PeerFailed):
            raise failure from error
        raise


async def _leave(ranks: Ranks, topic: str, error: BaseException) -> None:
    """Says that this rank does not come, since it was cancelled, or for a bug: nobody is to wait for it."""
    known = AsyncDCPError(f"{type(error).__name__}: {error}") if isinstance(error, Exception) else Cancelled(_CANCELLED)
    with move_on_after(_LAST_WORD_SECONDS, shield=True), suppress(AsyncDCPError):
        await ranks.refuse(topic, known)


def _root(failed: Sequence[tuple[int, ErrorFrame]]) -> AsyncDCPError:
    """Of several ranks' errors the lowest one's that is its own: others may only tell of that one."""
    rank, frame = min(failed, key=lambda each: (each[1].kind == PeerFailed.__name__, each[0]))
    if frame.kind == PeerFailed.__name__:
        return from_frame(frame)
    named = f"rank {rank}: {frame.message}" if rank else frame.message
    error = from_frame(msgspec.structs.replace(frame, message=named))
    error.rank = rank
    return error
