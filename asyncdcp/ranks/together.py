"""Work that all ranks do, and that went well only if it did on each of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import msgspec

from asyncdcp.errors import AsyncDCPError
from asyncdcp.ranks.port import Decide, Ranks, first_rank
from asyncdcp.worker.failures import from_frame, to_frame
from asyncdcp.worker.protocol import ErrorFrame


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
    that names the rank, for others can go on from it in the same way.
    """
    if ranks.world_size == 1:
        return decide([await work()])
    failure: AsyncDCPError | None = None
    try:
        told = _Outcome(await work())
    except AsyncDCPError as error:
        failure, told = error, _Outcome(error=to_frame(error, with_traceback=False))

    def judge(outcomes: Sequence[bytes]) -> bytes:
        found = [msgspec.msgpack.decode(outcome, type=_Outcome) for outcome in outcomes]
        for rank, outcome in enumerate(found):
            if outcome.error is not None:
                named = f"rank {rank}: {outcome.error.message}" if rank else outcome.error.message
                error = from_frame(msgspec.structs.replace(outcome.error, message=named))
                error.rank = rank
                raise error
        return decide([outcome.data for outcome in found])

    try:
        return await ranks.decide(topic, msgspec.msgpack.encode(told), judge, deadline=deadline)
    except AsyncDCPError as error:
        if failure is not None:
            raise failure from error
        raise
