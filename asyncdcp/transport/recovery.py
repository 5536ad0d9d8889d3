"""Recovery in one call: the newest of what some rank has live and what a run has saved, the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import msgspec
from anyio import CancelScope, to_thread

from asyncdcp.errors import AsyncDCPError, InvalidOption, PeerFailed, in_words
from asyncdcp.futures import CheckpointFuture
from asyncdcp.ranks import Ranks, find_ranks, gather, leave
from asyncdcp.transport.transport import PGTransport

Source = Literal["live", "checkpoint", "nothing"]


class SavedRun(Protocol):
    """What recovery asks of a ``CheckpointManager``."""

    def latest(self) -> CheckpointFuture[Any]:
        """The newest checkpoint, which has a ``step``; None if there is none."""
        ...

    def restore_latest(self, state: Any) -> CheckpointFuture[Any]:
        """Loads the newest that can be loaded, on all ranks alike, and gives it."""
        ...


@dataclass(frozen=True)
class Recovered:
    """What the state is now: that of ``step``, None with "nothing" to recover. ``rank`` is from whom this one received
    it; None for a rank that had it, and with a checkpoint.
    """

    source: Source
    step: int | None
    rank: int | None = None


class Told(msgspec.Struct, frozen=True):
    """What a rank has: the step of its live state, and of the newest checkpoint, if it was asked for that; or why it
    cannot tell.
    """

    live: int | None
    saved: int | None = None
    failed: str = ""


class Choice(NamedTuple):
    """``donors`` has for each rank that is to receive, from whom."""

    source: Source
    step: int | None
    donors: Mapping[int, int]


def choose(told: Sequence[Told]) -> Choice:
    """The newest step that some rank has live, unless rank 0 has seen a newer checkpoint. Those that have it share out
    those that do not.
    """
    live = max((each.live for each in told if each.live is not None), default=None)
    saved = told[0].saved
    if saved is not None and (live is None or saved > live):
        return Choice("checkpoint", saved, {})
    if live is None:
        return Choice("nothing", None, {})
    healthy = [rank for rank, each in enumerate(told) if each.live == live]
    others = [rank for rank, each in enumerate(told) if each.live != live]
    return Choice("live", live, {rank: healthy[n % len(healthy)] for n, rank in enumerate(others)})


def recover(
    transport: PGTransport,
    state: Mapping[Any, Any],
    *,
    step: int | None,
    manager: SavedRun | None = None,
    ranks: Ranks | None = None,
) -> CheckpointFuture[Recovered]:
    """Brings ``state`` to the newest step that there is, on all ranks of the transport's group, which all call it.

    ``step`` is that of this rank's state; None says that it has none, as after a start. A rank that has the newest
    sends, the others receive, in place. Where the newest checkpoint of ``manager`` is newer than all live states, or
    there are none, all load that, or the newest that is not damaged. The ranks agree by ``ranks``, by default the
    transport's group (``find_ranks``). ``state`` must not be used until it is done.

    If it fails on one rank, or is cancelled there, it fails on all: ``PeerFailed`` names the rank. A state that was to
    be received is then no one's, and says ``step=None`` at the next try.
    """
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        raise InvalidOption(f"step takes the number of the state's step, or None if it has none, not {step!r}")
    if not isinstance(state, Mapping):
        raise InvalidOption("recover takes the state to recover, such as {'model': model}")
    found = find_ranks(transport.group, transport.timeout, "timeout= of PGTransport") if ranks is None else ranks
    if (found.rank, found.world_size) != (transport.rank, transport.world_size):
        raise InvalidOption(
            f"the ranks that agree ({found.rank} of {found.world_size}) are not those of the transport "
            f"({transport.rank} of {transport.world_size})"
        )
    return transport.submit(partial(_recover, transport, state, step, manager, found), name="recovery")


async def _recover(
    transport: PGTransport, state: Any, step: int | None, manager: SavedRun | None, ranks: Ranks
) -> Recovered:
    told, failure = Told(step), None
    try:
        if manager is not None and ranks.rank == 0:
            latest = await _ended(manager.latest())
            told = Told(step, None if latest is None else int(latest.step))
    except Exception as error:  # noqa: BLE001  # all ranks hear of it, those too that come later
        failure = _known(error)
        told = Told(step, failed=in_words(failure))
    except BaseException as error:
        await leave(ranks, "recovery", error)
        raise
    words = await _gathered(ranks, "recovery", msgspec.msgpack.encode(told), failure)
    everybody = [msgspec.msgpack.decode(word, type=Told) for word in words]
    _raise_peers([each.failed for each in everybody])
    choice = choose(everybody)
    try:
        choice = await _carry_out(transport, state, manager, choice)
    except Exception as error:  # noqa: BLE001  # all ranks hear of it
        failure = _known(error)
    except BaseException as error:
        await leave(ranks, "recovered", error)
        raise
    outcome = "" if failure is None else in_words(failure)
    outcomes = await _gathered(ranks, "recovered", outcome.encode(), failure)
    _raise_peers([said.decode() for said in outcomes])
    return Recovered(choice.source, choice.step, choice.donors.get(transport.rank))


async def _gathered(ranks: Ranks, topic: str, said: bytes, failure: AsyncDCPError | None) -> list[bytes]:
    """What all ranks say; then raises this rank's own failure, which says more than what becomes of the agreement."""
    try:
        words = await gather(ranks, topic, said)
    except AsyncDCPError as error:
        if failure is not None:
            raise failure from error
        raise
    if failure is not None:
        raise failure
    return words


def _raise_peers(failed: Sequence[str]) -> None:
    for rank, said in enumerate(failed):
        if said:
            raise PeerFailed(f"rank {rank} could not recover: {said}", rank=rank)


async def _carry_out(transport: PGTransport, state: Any, manager: SavedRun | None, choice: Choice) -> Choice:
    """What came of it: of a run whose newest checkpoint is damaged an older one is loaded."""
    if choice.source == "checkpoint":
        if manager is None:
            raise InvalidOption("rank 0 has a manager and this rank has none; give it on all ranks")
        restored = await _ended(manager.restore_latest(state))
        return Choice("nothing", None, {}) if restored is None else choice._replace(step=int(restored.step))
    own = [rank for rank, donor in choice.donors.items() if donor == transport.rank]
    if own:
        await _outcome(lambda: transport.send_checkpoint(own, state).sent)
    elif transport.rank in choice.donors:
        await _outcome(lambda: transport.recv_checkpoint(choice.donors[transport.rank], state))
    return choice


def _known(error: Exception) -> AsyncDCPError:
    if isinstance(error, AsyncDCPError):
        return error
    known = AsyncDCPError(f"{type(error).__name__}: {error}")
    known.__cause__ = error
    return known


async def _outcome(verb: Callable[[], CheckpointFuture[Any]]) -> Any:
    """The verb's outcome; its own work for the call, such as taking the state apart, is done on a thread."""
    return await _ended(await to_thread.run_sync(verb))


async def _ended(future: CheckpointFuture[Any]) -> Any:
    """Its outcome; who is cancelled meanwhile gives it up, and goes on when nothing uses the state any more."""
    try:
        return await future
    finally:
        future.cancel()  # of no effect where it is done
        with CancelScope(shield=True):
            await future.settled()
        future.mark_seen()  # it may have failed as it was given up, and nobody else has it
