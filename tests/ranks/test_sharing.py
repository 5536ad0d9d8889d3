"""``load(replicas="broadcast")``: what ranks want alike is read by one of them; whoever fails, fails all, and nobody
waits in vain.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch exports it silently

from asyncdcp import LocalStorage, PerRank
from asyncdcp.checkpointer import loading, read_verbs, sharing
from asyncdcp.errors import Cancelled, ChecksumMismatch, InvalidOption, PeerError, PeerFailed, StorageError
from asyncdcp.ranks import Links, StoreRanks, together
from asyncdcp.ranks import links as links_module
from asyncdcp.storage.port import Fetch
from tests.ranks.conftest import Everywhere, Job, make_ranks, rows

Jobs = Callable[..., Job]
LARGE = torch.arange(1_300_000, dtype=torch.float64).view(1300, 1000)  # 10.4 MB, in several units
WHOLE = torch.arange(16 * 6, dtype=torch.float32).view(16, 6)


class Counted(LocalStorage):
    """Counts the bytes of data files that are read; ``hold`` is waited for before the first."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.read_bytes = 0
        self.hold: threading.Event | None = None
        self.reached = threading.Event()

    async def open(self, name: str) -> Any:
        if name.endswith(".safetensors") and self.hold is not None:
            self.reached.set()
            await asyncio.to_thread(self.hold.wait, 30)
        found: Any = await super().open(name)
        fetch = found.fetch

        async def counted(*reads: Fetch) -> None:
            self.read_bytes += sum(len(buffer) for read in reads for buffer in read.cached)
            await fetch(*reads)

        found.fetch = counted
        return found


def state(rank: int, *, filled: bool = True) -> dict[str, Any]:
    """Replicas of all sorts, halves that two ranks of four share, and what is each rank's own."""

    def full(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if filled else torch.zeros_like(tensor)

    return {
        "large": full(LARGE),
        "strided": full(LARGE[:40].t()).t(),
        "scalar": torch.tensor(7 if filled else 0),
        "small": [full(torch.full((5,), number, dtype=torch.int16)) for number in range(50)],
        "half": rows(WHOLE, rank % 2, 2, filled=filled),
        "quarter": rows(WHOLE, rank, 4, filled=filled),
        "own": PerRank(torch.full((9,), rank if filled else -1)),
    }


def check(found: dict[str, Any], rank: int) -> None:
    expected = state(rank)
    for name in ("large", "strided", "scalar"):
        assert torch.equal(found[name], expected[name]), name
    assert all(torch.equal(a, b) for a, b in zip(found["small"], expected["small"], strict=True))
    assert torch.equal(found["half"].local, expected["half"].local)
    assert torch.equal(found["quarter"].local, expected["quarter"].local)
    assert torch.equal(found["own"].value, expected["own"].value)


@pytest.fixture
def saved(job: Jobs, tmp_path: Path) -> tuple[Job, list[Counted]]:
    """Four ranks and the storages by which each is to load what they have saved."""
    four = job(4)
    for result in four.save(tmp_path / "it", state):
        assert not isinstance(result, BaseException), result
    return four, [Counted(tmp_path / "it") for _ in range(4)]


def load(four: Job, where: list[Counted], **options: Any) -> list[Any]:
    """What each rank's load comes to: its future, done."""
    options = {"replicas": "broadcast", **options}

    def one(each: Any, rank: int) -> Any:
        future = each.load(where[rank], state(rank, filled=False), **options)
        future.exception(60)
        return future

    return four.each(one)


def test_replicas_are_read_once_evenly_and_come_whole_to_all(saved: tuple[Job, list[Counted]]) -> None:
    four, where = saved
    alone = load(four, where, replicas="read")
    read_alone = [place.read_bytes for place in where]
    for place in where:
        place.read_bytes = 0
    futures = load(four, where)
    for rank, future in enumerate(futures):
        check(future.result(), rank)
    wanted = alone[0].report.read_bytes
    reports = [future.report for future in futures]
    shared = LARGE.nbytes + LARGE[:40].nbytes + 8 + 50 * 10
    own = 4 * (WHOLE.nbytes // 4 + 9 * 8)
    assert sum(report.read_bytes for report in reports) == shared + WHOLE.nbytes + own
    for report in reports:
        assert report.read_bytes + report.received_bytes == wanted
        assert report.read_bytes <= 1.2 * (shared + WHOLE.nbytes + own) / 4
    # from the disk itself: whole blocks, so some of them twice
    assert sum(read_alone) > 4 * shared
    assert sum(place.read_bytes for place in where) < 1.5 * sum(read_alone) / 4
    assert alone[0].report.received_bytes == 0


def test_new_states_and_other_dtypes_are_shared_too(saved: tuple[Job, list[Counted]]) -> None:
    four, where = saved
    anew = four.each(lambda each, rank: each.load(where[rank], replicas="broadcast").result(60))
    for rank, found in enumerate(anew):
        assert torch.equal(found["large"], LARGE) and torch.equal(found["half"], WHOLE)
        assert torch.equal(found["own"], torch.full((9,), rank))
    target = {"large": torch.zeros(LARGE.shape, dtype=torch.float32)}
    cast: dict[str, Any] = {"keys": ["large"], "cast": "allow", "replicas": "broadcast"}
    for found in four.each(
        lambda each, rank: each.load(where[rank], {"large": target["large"].clone()}, **cast).result(60)
    ):
        assert torch.equal(found["large"], LARGE.float())


def test_nothing_is_left_in_the_store_and_nothing_shared_connects_nobody(
    saved: tuple[Job, list[Counted]], monkeypatch: pytest.MonkeyPatch
) -> None:
    four, where = saved
    assert [future.exception() for future in load(four, where)] == [None] * 4
    assert four.ranks[0]._store.underlying_store.num_keys() == 0
    monkeypatch.setattr(Links, "connect", None)
    options: dict[str, Any] = {"keys": ["quarter", "own"], "replicas": "broadcast"}
    targets = [{"quarter": state(rank)["quarter"], "own": state(rank)["own"]} for rank in range(4)]
    found = four.each(lambda each, rank: each.load(where[rank], targets[rank], **options).result(60))
    assert not [each for each in found if isinstance(each, BaseException)]


def damage(folder: Path) -> None:
    """One byte of every data file that has a unit's worth."""
    for path in folder.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def test_damage_that_one_rank_reads_fails_all_with_its_name(saved: tuple[Job, list[Counted]], tmp_path: Path) -> None:
    four, where = saved
    whole = {path: path.read_bytes() for path in (tmp_path / "it").glob("*.safetensors")}
    damage(tmp_path / "it")
    begun = time.monotonic()
    for future in load(four, where):
        assert isinstance(future.exception(), ChecksumMismatch), future.exception()
        assert "does not match its checksum" in str(future.exception())
    assert time.monotonic() - begun < 20  # agreements have 30 s here, loads half an hour
    for path, content in whole.items():
        path.write_bytes(content)
    for rank, future in enumerate(load(four, where)):
        check(future.result(), rank)


@pytest.mark.parametrize("failing", [0, 3])
def test_a_storage_that_fails_on_one_rank_fails_all(saved: tuple[Job, list[Counted]], failing: int) -> None:
    four, where = saved

    async def gone(name: str) -> Any:
        raise StorageError("the disk is gone", errno=5)

    where[failing].open = gone  # type: ignore[method-assign]  # a fault, for this test
    begun = time.monotonic()
    for future in load(four, where):
        assert isinstance(future.exception(), StorageError) and future.exception().rank in (failing, None)
        assert "the disk is gone" in str(future.exception())
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("replicas", ["read", "broadcast"])
def test_a_rank_that_is_cancelled_keeps_nobody_waiting(saved: tuple[Job, list[Counted]], replicas: Any) -> None:
    four, where = saved
    held = where[1].hold = threading.Event()
    futures = four.each(lambda each, rank: each.load(where[rank], state(rank, filled=False), replicas=replicas))
    assert where[1].reached.wait(30)
    futures[1].cancel()
    held.set()
    begun = time.monotonic()
    errors = [future.exception(30) for future in futures]
    assert isinstance(errors[1], Cancelled)
    for rank in (0, 2, 3):
        assert isinstance(errors[rank], PeerFailed), errors[rank]
    assert time.monotonic() - begun < 20


def test_what_comes_damaged_over_the_network_is_not_taken(
    saved: tuple[Job, list[Counted]], monkeypatch: pytest.MonkeyPatch
) -> None:
    four, where = saved
    seal = sharing._seal

    def flipped(message: memoryview) -> None:
        seal(message)
        message[0] ^= 1

    monkeypatch.setattr(sharing, "_seal", flipped)
    for future in load(four, where):
        assert isinstance(future.exception(), PeerFailed)
        assert "came damaged over the network" in str(future.exception()) or "broke off" in str(future.exception())


def test_ranks_that_do_not_agree_on_it_are_told_so(saved: tuple[Job, list[Counted]]) -> None:
    four, where = saved
    modes: list[Any] = ["read", "read", "broadcast", "read"]
    found = four.each(lambda each, rank: each.load(where[rank], state(rank), replicas=modes[rank]).exception(60))
    for error in found:
        assert isinstance(error, InvalidOption)
        assert str(error) == "rank 0 and rank 2 load with different replicas=: all ranks must give the same"
    with pytest.raises(InvalidOption, match="replicas takes 'read' or 'broadcast', not 'all'"):
        four.checkpointers[0].load(where[0], replicas="all")  # type: ignore[call-overload]  # wrong on purpose


# ── the links themselves ──


@pytest.fixture
def linked(everywhere: Everywhere) -> Callable[..., list[Links]]:
    def connect(world_size: int, seconds: float = 30.0) -> list[Links]:
        until = time.monotonic() + seconds
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
    two = linked(2, 0.2)
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
    monkeypatch.setattr(links_module, "_PARTING_SECONDS", 0.05)
    asked, answer = threading.Event(), threading.Event()

    class Stuck:
        def delete_key(self, key: str) -> None:
            asked.set()
            assert answer.wait(30)

    links: Any = Links(None, Stuck(), 0, 2, 0.0)  # type: ignore[arg-type]  # a Store that is stuck
    try:
        with anyio.fail_after(10):
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
    three = make_ranks(3, deadline=8.0, store=store)
    connect = Links.connect

    async def fails(own: Any, rank: int, world_size: int, **options: Any) -> Links:
        if rank == 1 and how == "fails":
            raise StorageError("no network", errno=5)
        if rank == 1:
            await anyio.sleep(30)
        return await connect(own, rank, world_size, **options)

    monkeypatch.setattr(Links, "connect", fails)

    async def meet(each: Any, name: str) -> None:
        async def work() -> bytes:
            with anyio.move_on_after(0.05 if name == "cut" and each.rank == 1 else 30) as scope:
                await (await each.connect(name, until=time.monotonic() + 30)).aclose()
            if scope.cancelled_caught:
                raise StorageError("no network", errno=5)
            return b""

        await together(each, "the work", work, deadline=60)

    begun = time.monotonic()
    errors = everywhere(lambda each: anyio.run(meet, each, "cut"), three)
    assert [(type(error), "no network" in str(error)) for error in errors] == [(StorageError, True)] * 3, errors
    assert time.monotonic() - begun < 7  # and not until gloo gives up
    assert store.check(["job/links/cut/parted"])
    monkeypatch.setattr(Links, "connect", connect)
    assert everywhere(lambda each: anyio.run(meet, each, "again"), three) == [None] * 3
    assert not store.check(["job/links/cut/parted"])


@pytest.mark.parametrize("fault", ["_expanded", "Exchange", "CheckpointReader"])
def test_what_fails_on_one_rank_before_anything_is_read_fails_all_and_not_the_next_load(
    saved: tuple[Job, list[Counted]], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    four, where = saved
    real, begin = getattr(loading, fault), loading.load_state

    async def load_state(request: Any) -> Any:
        rank.set(request.ranks.rank)
        return await begin(request)

    class Broken:
        @staticmethod
        def of(*args: Any) -> Any:
            return failing(*args)

    def failing(*args: Any) -> Any:
        if rank.get() == 2:
            raise StorageError("out of room", errno=5)
        return (real.of if fault == "CheckpointReader" else real)(*args)

    rank: ContextVar[int] = ContextVar("rank")
    with monkeypatch.context() as patched:
        patched.setattr(read_verbs, "load_state", load_state)
        patched.setattr(loading, fault, Broken if fault == "CheckpointReader" else failing)
        begun = time.monotonic()
        for future in load(four, where):
            assert isinstance(future.exception(), StorageError), future.exception()
            assert "out of room" in str(future.exception())
        assert time.monotonic() - begun < 20  # agreements have 30 s here, loads half an hour
    for number, future in enumerate(load(four, where)):
        check(future.result(), number)
