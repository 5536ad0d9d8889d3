"""Recovery: who has the newest gives it, or all load it; one outcome on all ranks."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import anyio
import anyio.lowlevel
import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]  # torch exports them without saying so

from asyncdcp import CheckpointFuture
from asyncdcp.errors import AsyncDCPError, Cancelled, InvalidOption, PeerFailed, StateMismatch, UnseenFailure
from asyncdcp.manager import CheckpointManager
from asyncdcp.ranks import SoleRank, StoreRanks, gather, leave
from asyncdcp.transport import PGTransport, Recovered, recover
from asyncdcp.transport.recovery import Choice, Told, choose
from tests.transport.conftest import LONG, World


@pytest.mark.parametrize(
    ("told", "choice"),
    [
        ([Told(None, None), Told(None)], Choice("nothing", None, {})),
        ([Told(None, 4), Told(None)], Choice("checkpoint", 4, {})),
        ([Told(None, 4), Told(9)], Choice("live", 9, {0: 1})),
        ([Told(4, 4), Told(None)], Choice("live", 4, {1: 0})),
        ([Told(3, 4), Told(3)], Choice("checkpoint", 4, {})),
        ([Told(7), Told(6), Told(None), Told(7), Told(None)], Choice("live", 7, {1: 0, 2: 3, 4: 0})),
        ([Told(7), Told(7)], Choice("live", 7, {})),
        ([Told(0), Told(None)], Choice("live", 0, {1: 0})),
    ],
)
def test_the_newest_counts_and_donors_share_the_work(told: list[Told], choice: Choice) -> None:
    assert choose(told) == choice


class Rank(NamedTuple):
    transport: PGTransport
    ranks: StoreRanks
    state: dict[str, Any]


def job(world: World, values: list[float]) -> list[Rank]:
    """Ranks whose states differ."""
    _, transports = world(len(values))
    store = HashStore()
    return [
        Rank(each, StoreRanks(PrefixStore("job", store), n, len(values), deadline=LONG), {"w": torch.full((9,), value)})
        for n, (each, value) in enumerate(zip(transports, values, strict=True))
    ]


def outcomes(ranks: list[Rank], steps: list[int | None], manager: Any = None) -> list[Any]:
    futures = [
        recover(rank.transport, rank.state, step=step, ranks=rank.ranks, manager=manager)
        for rank, step in zip(ranks, steps, strict=True)
    ]
    return [future.exception(LONG) or future.result() for future in futures]


def test_those_that_have_nothing_or_less_receive(world: World) -> None:
    ranks = job(world, [1.0, 2.0, 3.0, 4.0])
    found = outcomes(ranks, [None, 8, 7, 8])
    assert found == [Recovered("live", 8, 1), Recovered("live", 8), Recovered("live", 8, 3), Recovered("live", 8)]
    assert [float(rank.state["w"][5]) for rank in ranks] == [2.0, 2.0, 4.0, 4.0]
    assert outcomes(ranks, [None] * 4) == [Recovered("nothing", None)] * 4


def test_a_newer_checkpoint_is_loaded_by_all(world: World, tmp_path: Path) -> None:
    ranks = job(world, [1.0, 2.0])
    with CheckpointManager(tmp_path / "run", process=False, process_group=SoleRank()) as manager:
        assert outcomes(ranks, [None, None], manager) == [Recovered("nothing", None)] * 2
        manager.save(5, {"w": torch.full((9,), 5.0)}).result(LONG)
        assert outcomes(ranks, [None, 6], manager) == [Recovered("live", 6, 1), Recovered("live", 6)]
        assert [float(rank.state["w"][0]) for rank in ranks] == [2.0, 2.0]
        assert outcomes(ranks, [4, None], manager) == [Recovered("checkpoint", 5)] * 2
        assert [float(rank.state["w"][0]) for rank in ranks] == [5.0, 5.0]


def test_where_the_newest_checkpoint_is_damaged_the_step_is_that_of_the_other(world: World, tmp_path: Path) -> None:
    ranks = job(world, [1.0, 2.0])
    with CheckpointManager(tmp_path / "run", process=False, process_group=SoleRank()) as manager:
        for step in (5, 7):
            manager.save(step, {"w": torch.full((9,), float(step))}).result(LONG)
        [data] = (tmp_path / "run" / "step_7").glob("*.safetensors")
        data.write_bytes(bytes(data.stat().st_size))
        assert outcomes(ranks, [3, None], manager) == [Recovered("checkpoint", 5)] * 2
    assert [float(rank.state["w"][0]) for rank in ranks] == [5.0, 5.0]


def test_a_failure_is_everybodys(world: World) -> None:
    ranks = job(world, [1.0, 2.0, 3.0])
    ranks[1].state["more"] = 1
    found = outcomes(ranks, [3, None, None])
    assert isinstance(found[0], PeerFailed)
    assert isinstance(found[1], StateMismatch)
    assert isinstance(found[2], PeerFailed)
    assert "rank 0 could not recover" in str(found[2])
    del ranks[1].state["more"]
    assert outcomes(ranks, [3, None, None])[1] == Recovered("live", 3, 0)


class Broken:
    def latest(self) -> Any:
        raise AsyncDCPError("the disk is gone")

    def restore_latest(self, state: Any) -> Any:
        raise AssertionError


def test_a_manager_that_cannot_look_is_told_to_all(world: World) -> None:
    found = outcomes(job(world, [1.0, 2.0]), [1, None], Broken())
    assert "the disk is gone" in str(found[0])
    assert isinstance(found[1], PeerFailed)
    assert "the disk is gone" in str(found[1])


def test_one_that_fails_long_before_the_others_come_is_heard(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """They meet first, in a store where others may have been before."""
    monkeypatch.setitem(leave.__globals__, "_LAST_WORD_SECONDS", 0)
    store, transports = HashStore(), world(2)[1]
    futures = []
    for rank, transport in enumerate(transports):
        ranks = StoreRanks(store, rank, 2, deadline=LONG / 4, meets=True)
        futures.append(recover(transport, {"n": rank}, step=rank, ranks=ranks, manager=Broken()))
        transport.submit(anyio.lowlevel.checkpoint, "what has begun before").result(LONG)
    assert all("the disk is gone" in str(future.exception(LONG)) for future in futures)


def test_wrong_input(world: World) -> None:
    [first, second] = job(world, [1.0, 2.0])
    for step in (-1, 1.5, True):
        with pytest.raises(InvalidOption, match="step takes"):
            recover(first.transport, first.state, step=step, ranks=first.ranks)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(InvalidOption, match="not those of the transport"):
        recover(first.transport, first.state, step=1, ranks=second.ranks)
    with pytest.raises(InvalidOption, match="the state to recover"):
        recover(first.transport, None, step=1, ranks=first.ranks)  # type: ignore[arg-type]  # on purpose


def test_one_that_is_cancelled_is_over_when_nothing_writes_to_the_state_any_more(world: World) -> None:
    ranks = job(world, [1.0, 2.0])
    hub = ranks[0].transport._link._hub  # type: ignore[attr-defined]  # a MemoryLink
    arriving, goes_on = threading.Event(), threading.Event()

    def stall(sender: int, receiver: int, into: Tensor) -> None:
        if into.nbytes == ranks[0].state["w"].nbytes:
            arriving.set()
            assert goes_on.wait(LONG)

    hub.tamper = stall
    futures = [
        recover(rank.transport, rank.state, step=step, ranks=rank.ranks)
        for rank, step in zip(ranks, [3, None], strict=True)
    ]
    assert arriving.wait(LONG)
    futures[1].cancel()
    for _ in range(5):
        ranks[1].transport.submit(anyio.lowlevel.checkpoint, "a turn of the loop").result(LONG)
    assert not futures[1].done()
    goes_on.set()
    assert isinstance(futures[1].exception(LONG), Cancelled)
    futures[0].cancel()
    assert futures[0].exception(LONG) is not None


def test_what_fails_as_a_cancelled_one_gives_it_up_is_nobodys_to_look_at(world: World) -> None:
    [alone] = job(world, [1.0])
    begun = threading.Event()

    async def newest() -> Any:
        return SimpleNamespace(step=7)

    async def fails_late() -> None:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            raise PeerFailed("the other side was faster", rank=1)

    class Run:
        def latest(self) -> CheckpointFuture[Any]:
            return alone.transport.submit(newest, "a look")

        def restore_latest(self, state: Any) -> CheckpointFuture[Any]:
            return alone.transport.submit(fails_late, "a load")

    future = recover(alone.transport, alone.state, step=None, ranks=SoleRank(), manager=Run())
    assert begun.wait(LONG)
    future.cancel()
    assert isinstance(future.exception(LONG), Cancelled)
    alone.transport.close()  # raises nothing


def test_a_failure_that_nobody_looked_at_comes_up_at_close(world: World) -> None:
    [first, second] = job(world, [1.0, 2.0])
    second.state["more"] = 1
    futures = [
        recover(rank.transport, rank.state, step=step, ranks=rank.ranks) for rank, step in [(first, 3), (second, None)]
    ]
    assert futures[0].exception(LONG) is not None
    assert futures[1].wait(LONG)
    with pytest.raises(UnseenFailure, match="recovery"):
        second.transport.close()


def test_closing_waits_for_one_and_refuses_it_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    [first, second] = job(world, [1.0, 2.0])
    closes, wait = threading.Event(), CheckpointFuture.wait

    def wait_for(*args: Any) -> bool:
        closes.set()
        return wait(*args)

    monkeypatch.setattr(CheckpointFuture, "wait", wait_for)

    class Late:
        def latest(self) -> Any:
            assert closes.wait(LONG)
            return first.transport.submit(anyio.lowlevel.checkpoint, "nothing is saved")

        def restore_latest(self, state: Any) -> Any:
            raise AssertionError

    late = Late()
    futures = [
        recover(rank.transport, rank.state, step=step, ranks=rank.ranks, manager=late)
        for rank, step in [(first, None), (second, 3)]
    ]
    first.transport.close()
    assert [future.result(LONG) for future in futures] == [Recovered("live", 3, 1), Recovered("live", 3)]


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_cancelled_fails_the_others_at_once(world: World, victim: int) -> None:
    """While the step of the newest checkpoint is looked up, or while it is loaded; and the next try is a new one."""

    class Stuck:
        def __init__(self, engine: PGTransport, *, latest: bool) -> None:
            self.engine, self.looks = engine, latest
            self.begun, self.never = threading.Event(), anyio.Event()

        async def _stuck(self) -> Any:
            self.begun.set()
            await self.never.wait()

        async def _newest(self) -> Any:
            return SimpleNamespace(step=7)

        def latest(self) -> Any:
            return self.engine.submit(self._stuck if self.looks else self._newest, "a look")

        def restore_latest(self, state: Any) -> Any:
            return self.engine.submit(self._stuck if self.engine.rank == victim else self._newest, "a load")

    ranks = job(world, [1.0, 2.0, 3.0])
    managers = [Stuck(rank.transport, latest=victim == 0) for rank in ranks]
    futures = [
        recover(rank.transport, rank.state, step=None, ranks=rank.ranks, manager=manager)
        for rank, manager in zip(ranks, managers, strict=True)
    ]
    assert managers[victim].begun.wait(LONG)
    futures[victim].cancel()
    found = [future.exception(LONG / 2) for future in futures]
    assert isinstance(found.pop(victim), Cancelled)
    assert all(isinstance(error, PeerFailed) and error.rank == victim for error in found), found
    assert outcomes(ranks, [None] * 3) == [Recovered("nothing", None)] * 3


def test_one_that_does_not_come_is_waited_for_as_long_as_the_transport_waits() -> None:
    ranks = StoreRanks(PrefixStore("job", HashStore()), 0, 2, deadline=0.05, option="timeout= of PGTransport")
    with pytest.raises(PeerFailed, match=r"within 0\.05 s \(timeout= of PGTransport\)"):
        anyio.run(gather, ranks, "recovery", b"")
