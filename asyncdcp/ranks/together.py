"""Work that all ranks do, and that went well only if it did on each of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import msgspec
from anyio import move_on_after

from asyncdcp.errors import AsyncDCPError, Cancelled, PeerError, PeerFailed
from asyncdcp.ranks.port import Decide, Ranks, first_rank
from asyncdcp.worker.failures import from_frame, to_frame
from asyncdcp.worker.protocol import ErrorFrame

_LAST_WORD_SECONDS = 5.0
_CANCELLED = "it was cancelled"
_SECOND_HAND = (PeerFailed.__name__, PeerError.__name__)


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
    that names the rank, for others can go on from it in the same way. A rank that only knows that a peer failed, or
    that not all were to be reached (``PeerFailed``, ``PeerError``), raises what all have agreed on, which is what
    failed the peer; it waits for the others as long as for any agreement, and no longer. A rank that is cancelled
    meanwhile fails all others at once (``PeerFailed``).
    """
    if ranks.world_size == 1:
        return decide([await work()])
    failure: AsyncDCPError | None = None
    try:
        told = _Outcome(await work())
    except AsyncDCPError as error:
        failure, told = error, _Outcome(error=to_frame(error, with_traceback=False))
    except BaseException as error:
        await leave(ranks, topic, error)
        raise

    def judge(outcomes: Sequence[bytes]) -> bytes:
        found = [msgspec.msgpack.decode(outcome, type=_Outcome) for outcome in outcomes]
        failed = [(rank, outcome.error) for rank, outcome in enumerate(found) if outcome.error is not None]
        if failed:
            raise _root(failed)
        return decide([outcome.data for outcome in found])

    limit = deadline if failure is None or _is_own(told.error) else None
    try:
        return await ranks.decide(topic, msgspec.msgpack.encode(told), judge, deadline=limit)
    except AsyncDCPError as error:
        if failure is not None and _is_own(told.error):
            raise failure from error
        raise


async def leave(ranks: Ranks, topic: str, error: BaseException) -> None:
    """Says that this rank does not come to an agreement, for it was cancelled or has failed: nobody is to wait."""
    known = AsyncDCPError(f"{type(error).__name__}: {error}") if isinstance(error, Exception) else Cancelled(_CANCELLED)
    with move_on_after(_LAST_WORD_SECONDS, shield=True), suppress(AsyncDCPError):
        await ranks.refuse(topic, known)


def _is_own(frame: ErrorFrame | None) -> bool:
    """Whether a rank's error is its own, and not what it has noticed of another's."""
    return frame is not None and frame.kind not in _SECOND_HAND


def _root(failed: Sequence[tuple[int, ErrorFrame]]) -> AsyncDCPError:
    """Of several ranks' errors the lowest one's that is its own: others may only tell of that one. Where all tell of
    others, that of the lowest that names one.
    """
    order = {kind: place for place, kind in enumerate(_SECOND_HAND, 1)}
    rank, frame = min(failed, key=lambda each: (order.get(each[1].kind, 0), each[0]))
    if not _is_own(frame):
        return from_frame(frame)
    named = f"rank {rank}: {frame.message}" if rank else frame.message
    error = from_frame(msgspec.structs.replace(frame, message=named))
    error.rank = rank
    return error
