"""Ranks that meet in a store which has seen others before them, as torchrun's has after a restart."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]  # torch exports them silently

from asyncdcp.errors import PeerFailed
from asyncdcp.ranks import StoreRanks, gather
from asyncdcp.ranks.keys import Keys, Meeting
from tests.ranks.conftest import Everywhere

WORLD = 3


def born(store: Store, *ranks: int, deadline: float = 30.0) -> list[StoreRanks]:
    """Processes that have just been started."""
    return [StoreRanks(store, rank, WORLD, deadline=deadline, meets=True) for rank in ranks]


def told(ranks: StoreRanks) -> list[bytes] | PeerFailed:
    try:
        return anyio.run(gather, ranks, "the making of a checkpointer", b"%d" % ranks.rank)
    except PeerFailed as error:
        return error


@pytest.mark.parametrize("before", [(0,), (1,), (2, 1), (0, 1), (0, 2), (0, 1, 2)])
def test_whoever_was_there_before(everywhere: Everywhere, before: tuple[int, ...]) -> None:
    """Some were killed before the others had come, and then all are started again, time after time."""
    store = HashStore()
    for _ in range(2):
        everywhere(told, born(store, *before, deadline=0.02))
        assert everywhere(told, born(store, *range(WORLD))) == [[b"0", b"1", b"2"]] * WORLD


def test_what_others_have_announced_before_is_not_heard(everywhere: Everywhere) -> None:
    store = HashStore()

    async def heard(ranks: StoreRanks) -> bytes | None:
        found = await ranks.heard("preempted")
        await gather(ranks, "looked", b"")
        await ranks.announce("preempted", b"1")
        return found

    for _ in range(2):
        assert everywhere(lambda each: anyio.run(heard, each), born(store, *range(WORLD))) == [None] * WORLD


def test_several_that_each_rank_makes_in_the_same_order_are_kept_apart(everywhere: Everywhere) -> None:
    store = HashStore()

    async def names(rank: int) -> list[list[bytes]]:
        return [await gather(born(store, rank)[0], "turn", b"%d" % turn) for turn in range(20)]

    found = everywhere(lambda rank: anyio.run(names, rank), range(WORLD))
    assert found == [[[b"%d" % turn] * WORLD for turn in range(20)]] * WORLD


@pytest.mark.parametrize("absent", range(WORLD))
async def test_all_see_who_does_not_come(absent: int) -> None:
    keys = Keys(HashStore(), WORLD)
    async with anyio.create_task_group() as first:
        for rank in range(WORLD):
            first.start_soon(Meeting(keys, rank, WORLD).meet)
    others = [Meeting(keys, rank, WORLD) for rank in range(WORLD) if rank != absent]
    async with anyio.create_task_group() as second:
        for each in others:
            second.start_soon(each.meet)
        expected = [absent] if absent else []  # nobody else is missing
        while [await each.missing() for each in others] != [expected] * len(others):
            await anyio.lowlevel.checkpoint()
        second.cancel_scope.cancel()


async def test_one_that_gives_up_and_comes_again_is_met() -> None:
    """While rank 0, which has heard it before, waits for the last."""
    store = HashStore()
    polled, keys = Keys(store, WORLD), Keys(store, WORLD)
    heard: list[str] = []

    async def meet(meeting: Meeting) -> None:
        heard.append(await meeting.meet())

    async def answered(meeting: Meeting) -> None:
        while await meeting.missing() != [2]:
            await anyio.lowlevel.checkpoint()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as all_ranks:
            all_ranks.start_soon(meet, Meeting(polled, 0, WORLD))
            async with anyio.create_task_group() as first:
                first.start_soon((given_up := Meeting(keys, 1, WORLD)).meet)
                await answered(given_up)
                seen = polled.requests + 8
                while polled.requests < seen:
                    await anyio.lowlevel.checkpoint()
                first.cancel_scope.cancel()
            all_ranks.start_soon(meet, again := Meeting(keys, 1, WORLD))
            await answered(again)
            all_ranks.start_soon(meet, Meeting(keys, 2, WORLD))
    assert len(heard) == WORLD and len(set(heard)) == 1


@pytest.mark.parametrize("given_up", range(WORLD))
async def test_one_that_gives_up_as_the_others_meet_it_is_met(given_up: int) -> None:
    """They would not come to another meeting, and it would wait in vain."""
    store = HashStore()
    ranks = born(store, *range(WORLD), deadline=60)

    async def say_first(rank: StoreRanks, key: str, scope: anyio.CancelScope) -> None:
        keys, say = rank._keys, rank._keys.set

        async def said(name: str, data: bytes) -> None:
            await say(name, data)
            if name == key:
                scope.cancel()
                await anyio.lowlevel.checkpoint()

        with pytest.MonkeyPatch.context() as patched, scope:
            patched.setattr(keys, "set", said)
            await rank.heard("preempted")

    with anyio.fail_after(30):
        async with anyio.create_task_group() as all_ranks:
            for rank in ranks:
                if rank.rank != given_up:
                    all_ranks.start_soon(rank.heard, "preempted")
            await say_first(ranks[given_up], f"here/{given_up}" if given_up else "met", anyio.CancelScope())
        assert await ranks[given_up].heard("preempted") is None


async def test_what_one_says_as_it_gives_up_does_not_come_after_what_it_says_next() -> None:
    keys, scope = Keys(HashStore(), WORLD), anyio.CancelScope()
    asked, said = keys.set, list[str]()

    async def late(name: str, data: bytes) -> None:
        scope.cancel()
        await anyio.lowlevel.checkpoint()
        await asked(name, data)
        said.append(name)

    keys.set = late  # type: ignore[method-assign]  # for this test
    with scope:
        await Meeting(keys, 0, WORLD).meet()
    assert said == ["call"]


def test_one_that_does_not_come_is_named(everywhere: Everywhere) -> None:
    [error] = everywhere(told, born(HashStore(), 0, deadline=0.02))
    assert "rank 1, 2 did not come to the agreement on the making of a checkpointer within 0.02 s" in str(error)
    [error] = everywhere(told, born(HashStore(), 1, deadline=0.02))
    assert isinstance(error, PeerFailed) and error.rank == 0
