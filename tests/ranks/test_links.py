"""Connections among ranks: whoever parts, hangs, fails or is cancelled is noticed, and nothing is left behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch exports it silently

from asyncdcp.errors import PeerError, PeerFailed, StorageError
from asyncdcp.ranks import Links, StoreRanks, together
from asyncdcp.ranks import links as links_module
from tests.ranks.conftest import Everywhere, make_ranks
from tests.work import leap


@pytest.fixture
def linked(everywhere: Everywhere) -> Callable[..., list[Links]]:
    def connect(world_size: int) -> list[Links]:
        until = time.monotonic() + 30
        found = everywhere(lambda each: anyio.run(lambda: each.connect("it", until=until)), make_ranks(world_size))
        assert all(isinstance(each, Links) for each in found), found
        return found

    return connect


def test_whoever_parts_is_noticed_by_all_that_wait_for_it(
    linked: Callable[..., list[Links]], everywhere: Everywhere
) -> None:
    """Rank 1 waits for 0, 2 for 1, 3 for 2. Rank 0 parts, and each that fails parts in its turn."""
    four = linked(4)
    waiting = threading.Barrier(4)

    async def take_part(links: Links, rank: int) -> None:
        try:
            await anyio.to_thread.run_sync(waiting.wait)
            if rank:
                await links.receive(rank - 1, 1, memoryview(bytearray(64)))
        finally:
            await links.abort()

    begun = time.monotonic()
    errors = everywhere(lambda links, rank: anyio.run(take_part, links, rank), four, range(4))
    assert errors[0] is None and time.monotonic() - begun < 10
    for rank in (1, 2, 3):
        assert isinstance(errors[rank], PeerFailed) and errors[rank].rank == rank - 1, errors[rank]


def test_a_peer_that_does_nothing_is_named_when_time_is_up(linked: Callable[..., list[Links]]) -> None:
    two = linked(2)
    two[1]._until = time.monotonic() + 0.2
    with pytest.raises(PeerFailed, match="what rank 0 passes on, or takes, was not done in time") as caught:
        anyio.run(two[1].receive, 0, 1, memoryview(bytearray(64)))
    assert caught.value.rank == 0


def test_a_cancelled_wait_returns_at_once(linked: Callable[..., list[Links]]) -> None:
    two = linked(2)

    async def give_up() -> bool:
        with anyio.move_on_after(0.05) as scope:
            await two[0].receive(1, 1, memoryview(bytearray(64)))
        await two[0].abort()
        return scope.cancelled_caught

    begun = time.monotonic()
    assert anyio.run(give_up) and time.monotonic() - begun < 10


def test_ranks_that_do_not_come_to_connect_are_an_error_in_time() -> None:
    store = HashStore()
    (first, _) = make_ranks(2, deadline=0.3, store=store)
    with pytest.raises(PeerError, match="the ranks could not connect to each other"):
        anyio.run(lambda: first.connect("it", until=time.monotonic() + 5))
    assert store.num_keys() == 1  # which tells the others


@pytest.mark.parametrize("fails", [True, False])
async def test_connecting_that_is_cancelled_leaves_nothing_in_the_store(
    monkeypatch: pytest.MonkeyPatch, *, fails: bool
) -> None:
    """Not even when the thread comes to its end later, one way or the other."""
    begun, go_on, deleted = threading.Event(), threading.Event(), threading.Event()

    class Seen(HashStore):
        def delete_key(self, key: str) -> bool:
            found = super().delete_key(key)
            deleted.set()
            return found

    def connecting(store: Any, rank: int, *_: Any) -> None:
        begun.set()
        assert go_on.wait(30)
        store.set(f"0/{rank}", "an address")
        if fails:
            raise RuntimeError("nobody came")

    monkeypatch.setattr(dist, "ProcessGroupGloo", connecting)
    store = Seen()
    waiting = asyncio.create_task(Links.connect(store, 1, 2, deadline=30, until=0))
    assert await anyio.to_thread.run_sync(begun.wait, 30)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not deleted.is_set()
    go_on.set()
    assert await anyio.to_thread.run_sync(deleted.wait, 30)
    assert store.num_keys() == 0


async def test_a_store_that_does_not_answer_holds_no_one_up_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "_PARTING_SECONDS", 30)
    loop, asked, answer = asyncio.get_running_loop(), threading.Event(), threading.Event()

    class Stuck:
        def delete_key(self, key: str) -> None:
            asked.set()
            loop.call_soon_threadsafe(leap, 30)
            assert answer.wait(30)

    links: Any = Links(None, Stuck(), 0, 2, 0.0)  # type: ignore[arg-type]  # a Store that is stuck
    try:
        with anyio.fail_after(60):
            await links.aclose()
    finally:
        answer.set()
    assert asked.is_set()


async def test_a_store_that_does_not_connect_anew_holds_no_one_up() -> None:
    """The loop goes on, and a cancel ends it at once, which the others hear of."""
    asked, answer = threading.Event(), threading.Event()

    class Stuck(HashStore):
        def clone(self) -> HashStore:
            asked.set()
            assert answer.wait(30)
            return self

    store = Stuck()
    ranks = StoreRanks(store, 1, 2, deadline=30.0)
    connecting = asyncio.create_task(ranks.connect("it", until=0.0))
    try:
        assert await anyio.to_thread.run_sync(asked.wait, 30)
        connecting.cancel()
        with anyio.fail_after(10), pytest.raises(asyncio.CancelledError):
            await connecting
        assert not answer.is_set()
    finally:
        answer.set()
    assert store.check(["links/it/parted"]) and store.get("links/it/parted") == b"1"


async def test_a_store_that_fails_before_the_ranks_connect_is_told_to_the_others() -> None:
    class Failing(HashStore):
        def delete_key(self, key: str) -> bool:
            raise RuntimeError(f"{key} is held")

    store = Failing()
    ranks = StoreRanks(store, 1, 2, deadline=30.0)
    ranks._parted.append("links/before/parted")
    with pytest.raises(PeerError, match="does not answer: links/before/parted is held"):
        await ranks.connect("it", until=0.0)
    assert store.check(["links/it/parted"]) and store.get("links/it/parted") == b"1"
    assert ranks._parted == ["links/before/parted", "links/it/parted"]  # to be deleted yet


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
def test_who_does_not_connect_after_all_keeps_nobody_waiting(
    everywhere: Everywhere, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    store = HashStore()
    three = make_ranks(3, deadline=30.0, store=store)
    connect = Links.connect

    async def fails(own: Any, rank: int, world_size: int, **options: Any) -> Links:
        if rank == 1 and how == "fails":
            raise StorageError("no network", errno=5)
        if rank == 1:
            await anyio.sleep(30)
        return await connect(own, rank, world_size, **options)

    monkeypatch.setattr(Links, "connect", fails)

    async def meet(each: Any, name: str) -> None:
        links: list[Links] = []

        async def work() -> bytes:
            with anyio.move_on_after(0.05 if name == "cut" and each.rank == 1 else 30) as scope:
                links.append(await each.connect(name, until=time.monotonic() + 30))
            if scope.cancelled_caught:
                raise StorageError("no network", errno=5)
            return b""

        try:
            await together(each, "the work", work, deadline=60)
        finally:
            for made in links:  # once all are connected: one that is may be before another has read its address
                await made.aclose()

    begun = time.monotonic()
    errors = everywhere(lambda each: anyio.run(meet, each, "cut"), three)
    assert [(type(error), "no network" in str(error)) for error in errors] == [(StorageError, True)] * 3, errors
    assert time.monotonic() - begun < 20  # and not until gloo gives up
    assert store.check(["job/links/cut/parted"])
    monkeypatch.setattr(Links, "connect", connect)
    assert everywhere(lambda each: anyio.run(meet, each, "again"), three) == [None] * 3
    assert not store.check(["job/links/cut/parted"])
