"""Agreements over a store: they end alike on all ranks, in time, and leave nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from torch import distributed as dist
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]  # torch exports them without saying so

from asyncdcp.errors import (
    AsyncDCPError,
    Cancelled,
    CheckpointNotFound,
    InvalidOption,
    PeerError,
    PeerFailed,
    UsageError,
)
from asyncdcp.ranks import Decide, Ranks, SoleRank, StoreRanks, barrier, find_ranks, first_rank, gather, together
from tests.ranks.conftest import Everywhere, late_ranks, make_ranks
from tests.work import leap


def run(function: Callable[..., Any], *args: Any) -> Any:
    return anyio.run(function, *args)


def joined(told: Sequence[bytes]) -> bytes:
    return b"|".join(told)


def test_all_hear_what_rank_0_decides_of_what_all_told(everywhere: Everywhere) -> None:
    ranks = make_ranks(4)
    heard = everywhere(lambda each: run(each.decide, "topic", b"%d" % each.rank, joined), ranks)
    assert heard == [b"0|1|2|3"] * 4


def test_long_values_are_cut_where_a_tcp_store_refuses_them(everywhere: Everywhere) -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ranks = make_ranks(2, store=store)
    data = bytes(range(256)) * (40 << 10)  # 10 MiB, where a message may have 8
    assert everywhere(lambda each: run(each.decide, "long", data, first_rank), ranks) == [data] * 2
    assert everywhere(lambda each: run(gather, each, "short", b""), ranks) == [[b"", b""]] * 2


def test_nothing_is_left_in_the_store(everywhere: Everywhere) -> None:
    store = HashStore()
    ranks = make_ranks(3, store=store)

    async def talk(each: StoreRanks) -> None:
        for number in range(3):
            await gather(each, "a", b"x" * number)
            await each.broadcast("b", b"y" if each.rank == 0 else None)
            await barrier(each, "c")
        with pytest.raises(PeerFailed) if each.rank != 1 else pytest.raises(InvalidOption):
            if each.rank == 1:
                error = InvalidOption("not I")
                await each.refuse("d", error)
                raise error
            await barrier(each, "d")

    assert everywhere(lambda each: run(talk, each), ranks) == [None] * 3
    assert store.num_keys() == 0


def test_who_does_not_come_is_named_in_time_and_the_next_agreement_is_sound(everywhere: Everywhere) -> None:
    ranks = late_ranks(4, [0, 1, 3])
    for error in everywhere(lambda each: run(barrier, each, "save"), [ranks[0], ranks[1], ranks[3]]):
        assert isinstance(error, PeerFailed) and error.rank == 2
        assert str(error).startswith("rank 2 did not come to the agreement on save within 60 s (option")
    for each in ranks:
        each.come = None
    ranks[2]._turns["save"] += 1  # it had called, but died before it could tell
    told = everywhere(lambda each: run(gather, each, "save", b"%d" % each.rank), ranks)
    assert told == [[b"0", b"1", b"2", b"3"]] * 4


def test_an_absent_rank_0_is_named(everywhere: Everywhere) -> None:
    ranks = make_ranks(3, deadline=0.3)
    for error in everywhere(lambda each: run(barrier, each, "save"), ranks[1:]):
        assert isinstance(error, PeerFailed) and error.rank == 0


def test_a_refusal_is_heard_at_once_and_with_its_cause(everywhere: Everywhere) -> None:
    ranks = make_ranks(3)

    async def take_part(each: Ranks) -> None:
        if each.rank == 1:
            await each.refuse("save", InvalidOption("this cannot be stored"))
        else:
            await barrier(each, "save")

    first, second, third = everywhere(lambda each: run(take_part, each), ranks)
    assert second is None
    for error in (first, third):
        assert isinstance(error, PeerFailed) and error.rank == 1
        assert str(error) == "rank 1 failed: this cannot be stored"


def test_an_error_of_the_decision_is_everyones(everywhere: Everywhere) -> None:
    ranks = make_ranks(3)

    def decide(told: Sequence[bytes]) -> bytes:
        raise CheckpointNotFound("no checkpoint at run", path="run")

    for error in everywhere(lambda each: run(each.decide, "load", b"", decide), ranks):
        assert type(error) is CheckpointNotFound
        assert (str(error), error.path) == ("no checkpoint at run", "run")


def test_a_bug_in_the_decision_is_everyones(everywhere: Everywhere) -> None:
    def decide(told: Sequence[bytes]) -> bytes:
        raise ZeroDivisionError("none")

    for error in everywhere(lambda each: run(each.decide, "load", b"", decide), make_ranks(2)):
        assert type(error) is PeerError
        assert str(error) == "the decision failed: ZeroDivisionError: none"


def test_a_cancelled_rank_keeps_nobody_waiting(everywhere: Everywhere) -> None:
    ranks = make_ranks(3)

    async def take_part(each: Ranks) -> object:
        if each.rank:
            await barrier(each, "save")
            return None
        with anyio.move_on_after(0.05) as scope:
            await each.decide("save", b"", first_rank)
        return scope.cancelled_caught

    missing, second = everywhere(lambda each: run(take_part, each), ranks[:2])
    assert missing is True
    assert isinstance(second, PeerFailed) and second.rank == 0


def test_one_that_is_cancelled_as_it_wins_the_right_to_speak_does_speak(everywhere: Everywhere) -> None:
    """Nobody else could, and all would wait for their deadline."""

    async def take_part(each: StoreRanks) -> Any:
        with anyio.CancelScope() as scope:
            if each.rank == 0:
                add = each._keys.add

                async def won(name: str) -> int:
                    count = await add(name)
                    scope.cancel()
                    await anyio.lowlevel.checkpoint()
                    return count

                each._keys.add = won  # type: ignore[method-assign]  # a fault, for this test
            return await each.decide("save", b"said", first_rank)
        return scope.cancelled_caught

    assert everywhere(lambda each: run(take_part, each), make_ranks(2)) == [True, b"said"]


@pytest.mark.parametrize("cancelled", [0, 1])
def test_one_that_is_cancelled_as_it_hears_the_decision_goes_by_it_as_all_do(
    everywhere: Everywhere, cancelled: int
) -> None:
    """It would else agree anew, by itself."""

    async def take_part(each: StoreRanks) -> Any:
        heard: list[bytes] = []
        with anyio.CancelScope() as scope:
            if each.rank == cancelled:
                get = each._keys.get

                async def seen(name: str) -> bytes:
                    if name.endswith("verdict"):
                        scope.cancel()
                        await anyio.lowlevel.checkpoint()
                    return await get(name)

                each._keys.get = seen  # type: ignore[method-assign]  # a fault, for this test
            heard.append(await each.decide("save", b"said", first_rank))
        return heard

    assert everywhere(lambda each: run(take_part, each), make_ranks(2)) == [[b"said"], [b"said"]]


def test_a_broadcast_waits_for_nobody_but_its_readers_do(everywhere: Everywhere) -> None:
    ranks = make_ranks(3, deadline=0.2)
    (late,) = everywhere(lambda each: run(each.broadcast, "step", None), ranks[1:2])
    assert isinstance(late, PeerFailed) and late.rank == 0
    ranks = make_ranks(3)
    assert run(ranks[0].broadcast, "step", b"7") == b"7"
    assert run(ranks[0].broadcast, "step", b"8") == b"8"
    assert everywhere(lambda each: run(each.broadcast, "step", None), ranks[1:]) == [b"7"] * 2
    assert everywhere(lambda each: run(each.broadcast, "step", None), ranks[1:]) == [b"8"] * 2


def test_a_broadcast_that_the_store_does_not_take_fails_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(_: str) -> None:
        leap(alone.deadline)
        await anyio.sleep_forever()

    alone = make_ranks(2)[0]
    monkeypatch.setattr(alone._keys, "add", never)
    with pytest.raises(PeerError, match="did not answer within 30 s"):
        run(alone.broadcast, "step", b"7")


def refuse(told: Sequence[bytes]) -> bytes:
    raise Cancelled("no")


@pytest.mark.parametrize("decide", [first_rank, refuse])
def test_rank_0_which_may_host_the_store_is_done_last(everywhere: Everywhere, decide: Decide) -> None:
    """It looks whether all have read before it goes on, and perhaps ends, and the store with it."""
    store, gate, ended = HashStore(), threading.Event(), threading.Event()

    class Hosts:
        """Rank 0's."""

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def check(self, keys: list[str]) -> bool:
            if keys[0].endswith("/read"):
                gate.set()
            return store.check(keys)

    class Reaches:
        """Rank 1's, which is slow to read."""

        def __getattr__(self, name: str) -> Any:
            if ended.is_set():
                raise RuntimeError("connection reset by peer")
            return getattr(store, name)

        def get(self, key: str) -> bytes:
            assert gate.wait(30)
            return self.__getattr__("get")(key)

    def take_part(rank: int) -> None:
        own: Any = Reaches() if rank else Hosts()
        with suppress(Cancelled):
            run(StoreRanks(own, rank, 2, deadline=30).decide, "the last one", b"", decide)
        if rank == 0:
            ended.set()
            gate.set()

    assert everywhere(take_part, range(2)) == [None] * 2
    assert store.num_keys() == 0


def test_a_store_that_fails_is_a_peers_fault() -> None:
    class Broken(HashStore):
        def set(self, key: str, value: Any) -> None:
            raise RuntimeError("connection reset")

    ranks = StoreRanks(Broken(), 0, 2, deadline=5)
    with pytest.raises(
        PeerError,
        match=r"the store of the process group does not answer: connection reset .*: close checkpointers before",
    ):
        run(barrier, ranks, "save")


def test_a_sole_rank_is_of_one_mind() -> None:
    alone = SoleRank()
    assert run(gather, alone, "topic", b"x") == [b"x"]
    assert run(alone.broadcast, "topic", b"y") == b"y"
    with pytest.raises(AsyncDCPError, match="no"):
        run(alone.decide, "topic", b"", refuse)


def test_without_a_process_group_there_is_one_rank_unless_a_launcher_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert isinstance(find_ranks(None, 1.0), SoleRank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"one of 2 processes .* call torch.distributed.init_process_group\(\) before"):
        find_ranks(None, 1.0)
    alone = SoleRank()
    assert find_ranks(alone, 1.0) is alone
    outside: Any = dist.GroupMember.NON_GROUP_MEMBER  # what new_group() gives to those who are not in it
    with pytest.raises(UsageError, match="not one of the process_group"):
        find_ranks(outside, 1.0)


@pytest.mark.parametrize("kind", [PeerError, PeerFailed])
def test_what_is_known_at_second_hand_neither_hides_the_cause_nor_waits_for_long(
    everywhere: Everywhere, kind: type[AsyncDCPError]
) -> None:
    async def fail(each: StoreRanks, error: AsyncDCPError) -> None:
        async def work() -> bytes:
            raise error

        await together(each, "the work", work, deadline=60)

    found = [kind("not all were there"), CheckpointNotFound("the cause"), kind("not all were there")]
    errors = everywhere(lambda each, error: run(fail, each, error), make_ranks(3), found)
    assert [(type(error), "the cause" in str(error)) for error in errors] == [(CheckpointNotFound, True)] * 3
    alone = late_ranks(2, [0])[0]
    with pytest.raises(PeerFailed, match="rank 1 did not come"):
        run(fail, alone, kind("not all were there"))
