"""A manager on several ranks, which are threads here: one truth, and failures that all of them see."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]  # torch exports them without saying so

from asyncdcp import CheckpointManager, EverySteps, KeepLast, PerRank
from asyncdcp.errors import (
    AsyncDCPError,
    CheckpointNotFound,
    Fenced,
    InvalidOption,
    PeerFailed,
    StateMismatch,
    UnseenFailure,
)
from asyncdcp.manager.deciding import WINDOW
from asyncdcp.manager.restoring import said
from asyncdcp.ranks import SoleRank, StoreRanks
from asyncdcp.runs import read_history
from asyncdcp.storage import LocalPlace

WORLD = 2
Everywhere = Callable[[Callable[[int, CheckpointManager], Any]], list[Any]]


@pytest.fixture
def everywhere(run: Path) -> Iterator[Callable[..., list[Any]]]:
    """Calls a function on every rank, each with a manager of the run, and returns the results, or the errors."""
    with ThreadPoolExecutor(WORLD) as pool:

        def call(function: Callable[[int, CheckpointManager], Any], deadline: float = 20, **options: Any) -> list[Any]:
            store = HashStore()

            def work(rank: int) -> Any:
                ranks = StoreRanks(PrefixStore("job", store), rank, WORLD, deadline=deadline)
                own: dict[str, Any] = {**options, "process": False, "process_group": ranks, "takeover_seconds": 0}
                with CheckpointManager(run, **own) as manager:
                    return function(rank, manager)

            jobs = [pool.submit(work, rank) for rank in range(WORLD)]
            return [job.exception(40) or job.result() for job in jobs]

        yield call


def state(rank: int, step: int) -> dict[str, Any]:
    return {"weight": torch.full((8,), float(step)), "own": PerRank({"rank": rank, "step": step})}


def save_some(rank: int, manager: CheckpointManager) -> list[int]:
    manager.restore_latest(state(rank, 0)).result()
    for step in range(1, 7):
        if manager.should_save(step):
            manager.save(step, state(rank, step), metrics={"loss": 1 / step}).result()
    manager.wait().result()
    return manager.steps().result()


def test_all_save_and_all_restore_the_same(everywhere: Callable[..., list[Any]], run: Path) -> None:
    options = {"save_when": EverySteps(2), "keep": KeepLast(2)}
    assert everywhere(save_some, **options) == [[4, 6]] * WORLD
    last = asyncio.run(read_history(LocalPlace(run)))[-1]
    assert last.stored_bytes == sum(file.stat().st_size for file in (run / "step_6").glob("*.safetensors"))

    def restore(rank: int, manager: CheckpointManager) -> Any:
        target = state(rank, 0)
        restored = manager.restore_latest(target).result()
        assert restored is not None and restored.ranks == WORLD
        return restored.step, float(target["weight"][0]), target["own"].value

    assert everywhere(restore) == [(6, 6.0, {"rank": rank, "step": 6}) for rank in range(WORLD)]


def test_another_world_says_what_it_wants_of_each_ranks_own(everywhere: Callable[..., list[Any]], run: Path) -> None:
    everywhere(save_some, save_when=EverySteps(3))
    with CheckpointManager(run, process=False, process_group=SoleRank(), takeover_seconds=0) as manager:
        target = state(7, 0)
        with pytest.raises(StateMismatch, match="saved by 2 ranks and is loaded by 1"):
            manager.restore_latest(target).result()
        manager.restore_latest(target, per_rank="drop").result()
        assert (float(target["weight"][0]), target["own"].value) == (6.0, {"rank": 7, "step": 0})
        manager.restore(3, target, per_rank="rank0").result()
        assert (float(target["weight"][0]), target["own"].value) == (3.0, {"rank": 0, "step": 3})


def test_damage_that_one_rank_meets_makes_all_fall_back(everywhere: Callable[..., list[Any]], run: Path) -> None:
    everywhere(save_some, save_when=EverySteps(3))
    for path in (run / "step_6").glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        break

    def restore(rank: int, manager: CheckpointManager) -> Any:
        target = state(rank, 0)
        restored = manager.restore_latest(target).result()
        assert restored is not None
        return restored.step, float(target["weight"][0])

    assert everywhere(restore) == [(3, 3.0)] * WORLD


@pytest.mark.parametrize("far_too", [False, True])
def test_damage_that_one_rank_meets_is_mended_from_the_mirror_for_all(
    everywhere: Callable[..., list[Any]], run: Path, tmp_path: Path, far_too: bool
) -> None:
    far = tmp_path / "far"
    everywhere(save_some, save_when=EverySteps(3), mirror=far)
    for place in (run, far)[: 1 + far_too]:
        path = max((place / "step_6").glob("*.safetensors"))
        path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))

    def restore(rank: int, manager: CheckpointManager) -> Any:
        target = state(rank, 0)
        restored = manager.restore_latest(target).result()
        assert restored is not None
        return restored.step, float(target["weight"][0]), target["own"].value["step"], manager._session.standing.step

    step = 3 if far_too else 6
    assert everywhere(restore, mirror=far) == [(step, float(step), step, step)] * WORLD


def test_what_rank_0_cannot_find_no_rank_finds(everywhere: Callable[..., list[Any]]) -> None:
    found = everywhere(lambda rank, manager: manager.restore(5, state(rank, 0)).result())
    assert isinstance(found[0], CheckpointNotFound)
    assert isinstance(found[1], PeerFailed) and "no checkpoint of step 5" in str(found[1])


def test_a_step_is_looked_up_by_rank_0_and_loaded_by_all(everywhere: Callable[..., list[Any]]) -> None:
    """Whatever this rank sees of the storage so far."""

    def load(rank: int, manager: CheckpointManager) -> Any:
        manager.restore_latest(state(rank, 0)).result()
        manager.save(1, state(rank, 1)).result()
        if rank:
            manager._session.look = None  # type: ignore[assignment,method-assign]  # it is not asked
        found = manager.load(1, state(rank, 0)).result()
        with pytest.raises(CheckpointNotFound if rank == 0 else PeerFailed, match="no checkpoint of step 2"):
            manager.load(2).result()
        return found["own"].value

    assert everywhere(load) == [{"rank": rank, "step": 1} for rank in range(WORLD)]


@pytest.mark.parametrize("victim", range(WORLD))
def test_what_one_rank_refuses_at_the_call_fails_the_others_at_once(
    everywhere: Callable[..., list[Any]], victim: int
) -> None:
    calls: list[tuple[Callable[[CheckpointManager], Any], Callable[[CheckpointManager], Any]]] = [
        (lambda manager: manager.load(True), lambda manager: manager.load(1)),
        (lambda manager: manager.restore(None, {}), lambda manager: manager.restore(1, state(1, 0))),  # type: ignore[arg-type]  # on purpose
        (lambda manager: manager.restore_latest(None), lambda manager: manager.restore_latest(state(0, 0))),
    ]

    def call(rank: int, manager: CheckpointManager) -> Any:
        manager.restore_latest(state(rank, 0)).result()
        manager.save(1, state(rank, 1)).result()
        for wrong, right in calls:
            if rank == victim:
                with pytest.raises(InvalidOption):
                    wrong(manager)
            else:
                with pytest.raises(PeerFailed, match=f"rank {victim} failed: InvalidOption"):
                    right(manager).result()
        return manager.restore_latest(state(rank, 0)).result().step  # type: ignore[union-attr]  # step 1 is there

    assert everywhere(call, deadline=60.0) == [1] * WORLD


async def test_an_error_that_names_a_path_that_is_not_utf_8_is_told_all_the_same() -> None:
    told: list[bytes] = []

    class Telling(SoleRank):
        async def broadcast(self, topic: str, data: bytes | None) -> bytes:
            told.append(data or b"")
            return data or b""

    async def work() -> int:
        raise CheckpointNotFound("no checkpoint at there/\udcff")

    with pytest.raises(CheckpointNotFound):
        await said(Telling(), "candidates", work, int)
    assert b"there" in told[0]


def test_a_failed_save_comes_up_on_all_ranks_at_one_step(everywhere: Callable[..., list[Any]], run: Path) -> None:
    run.mkdir()
    (run / f"step_{2 * WINDOW}").write_text("in the way")

    def train(rank: int, manager: CheckpointManager) -> Any:
        manager.restore_latest(state(rank, 0)).result()
        for step in range(1, 20 * WINDOW):
            try:
                if manager.should_save(step):
                    manager.save(step, state(rank, step)).committed.wait(20)
            except AsyncDCPError as error:
                return step, type(error), "step_16" in str(error)
        return None

    first, second = everywhere(train, save_when=lambda moment: moment.step == WINDOW)
    assert first == second and first[0] > 2 * WINDOW and first[1:] == (UnseenFailure, True)


def test_what_was_decided_before_a_rollback_does_not_count_after_it(everywhere: Callable[..., list[Any]]) -> None:
    once = iter([True])

    def train(rank: int, manager: CheckpointManager) -> Any:
        manager.restore_latest(state(rank, 0)).result()
        manager.save(1, state(rank, 1)).result()
        passes = []
        for _ in range(2):
            passes.append([step for step in range(2, 6 * WINDOW) if manager.should_save(step)])
            manager.restore(1, state(rank, 0)).result()
        return passes

    when = {"save_when": lambda moment: moment.step >= WINDOW and next(once, False)}
    assert everywhere(train, **when) == [[[2 * WINDOW], []]] * WORLD


@pytest.mark.parametrize(("verb", "victim"), [("should_save", 0), ("wait", 1)])
def test_a_failure_that_names_a_path_that_is_not_utf_8_comes_up_on_all_ranks(
    everywhere: Callable[..., list[Any]], verb: str, victim: int
) -> None:
    def train(rank: int, manager: CheckpointManager) -> Any:
        manager.restore_latest(state(rank, 0)).result()
        if rank == victim:
            manager._saves.collect(OSError("no such file: there/\udcff"))  # as a save's that nobody looked at
        with pytest.raises(UnseenFailure, match=r"no such file: there"):
            if verb == "wait":
                manager.wait().result()
            for step in range(3 * WINDOW):
                manager.should_save(step)
        return "told"

    assert everywhere(train) == ["told"] * WORLD


def test_a_newer_job_fences_all_ranks(everywhere: Callable[..., list[Any]], run: Path) -> None:
    def train(rank: int, manager: CheckpointManager) -> Any:
        manager.restore_latest(state(rank, 0)).result()
        if rank == 0:
            with CheckpointManager(run, process=False, takeover_seconds=0):
                pass
        manager.save(1, state(rank, 1)).result()
        try:
            manager.wait().result()
        except AsyncDCPError as error:
            return type(error), str(error)

    first, second = everywhere(train)
    assert isinstance(first, Fenced)  # in wait, and again as it closes
    assert second[0] is UnseenFailure and "rank 0 failed: Fenced: another writer" in second[1]
