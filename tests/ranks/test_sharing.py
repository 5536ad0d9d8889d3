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

import pytest
import torch

from asyncdcp import LocalStorage, PerRank
from asyncdcp.checkpointer import loading, read_verbs, sharing
from asyncdcp.errors import Cancelled, ChecksumMismatch, InvalidOption, PeerFailed, StorageError
from asyncdcp.ranks import Links
from asyncdcp.storage.port import Fetch
from tests.ranks.conftest import Job, rows

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
    assert four.ranks[0]._keys._store.underlying_store.num_keys() == 0
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
