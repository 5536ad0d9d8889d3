"""Several ranks save to one checkpoint and load it, whoever they are; they talk once, and never again."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncdcp import AsyncCheckpointer, PerRank, RNGState, TrainState
from asyncdcp.errors import PeerFailed, ReplicaMismatch, StateMismatch, StructureChanged, UnsupportedValue
from tests.ranks.conftest import Job, rows

Jobs = Callable[..., Job]

WHOLE = torch.arange(7 * 6, dtype=torch.float32).view(7, 6)


def sharded(rank: int, world_size: int, *, filled: bool = True) -> dict[str, Any]:
    return {"model": {"weight": rows(WHOLE, rank, world_size, filled=filled)}, "step": 3 if filled else 0}


def fine(results: list[Any]) -> list[Any]:
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize(("saved", "loaded"), [(1, 3), (2, 1), (3, 2), (4, 4), (2, 8)])
def test_what_some_ranks_have_saved_others_load(job: Jobs, tmp_path: Path, saved: int, loaded: int) -> None:
    results = fine(job(saved).save(tmp_path / "it", lambda rank: sharded(rank, saved)))
    assert len({result.save_id for result in results}) == 1
    states = fine(job(loaded).load(tmp_path / "it", lambda rank: sharded(rank, loaded, filled=False)))
    for rank, state in enumerate(states):
        assert torch.equal(state["model"]["weight"].local, rows(WHOLE, rank, loaded).local)
        assert state["step"] == 3
    (anew,) = fine(job(1).load(tmp_path / "it", lambda rank: None))
    assert torch.equal(anew["model"]["weight"], WHOLE) and anew["step"] == 3


def test_a_repeated_save_talks_to_nobody(job: Jobs, tmp_path: Path) -> None:
    three = job(3)
    fine(three.save(tmp_path / "1", lambda rank: sharded(rank, 3)))
    before = three.requests
    fine(three.save(tmp_path / "2", lambda rank: sharded(rank, 3)))
    fine(three.save(tmp_path / "3", lambda rank: {"step": 4, "more": torch.ones(2)}))  # another structure, too
    assert three.requests == before


def replicated(rank: int) -> dict[str, Any]:
    model = torch.nn.Sequential(*(torch.nn.Linear(300, 300) for _ in range(6)), torch.nn.BatchNorm1d(300))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.fill_(number)
        for name, buffer in model.named_buffers():
            buffer.fill_(rank + (10 if name.endswith("var") else 0))
    return {"model": model}


def test_replicas_are_written_once_evenly_and_buffers_by_one(job: Jobs, tmp_path: Path) -> None:
    results = fine(job(4).save(tmp_path / "it", replicated))
    data = [path.stat().st_size for path in sorted(tmp_path.glob("it/*.safetensors"))]
    total = sum(tensor.nbytes for tensor in replicated(0)["model"].state_dict().values())
    assert sum(data) < total + 4 * 4096 * 2
    assert max(result.tensor_bytes for result in results) <= 1.1 * total / 4
    (loaded,) = fine(job(1).load(tmp_path / "it", lambda rank: None))
    assert set(loaded["model"]["6.running_mean"].tolist()) == {0.0}
    assert set(loaded["model"]["6.running_var"].tolist()) == {10.0}
    for number, (name, _) in enumerate(replicated(0)["model"].named_parameters()):
        assert set(loaded["model"][name].flatten().tolist()) == {float(number)}


def test_a_path_that_is_not_utf_8(job: Jobs, tmp_path: Path) -> None:
    two, path = job(2), tmp_path / os.fsdecode(b"caf\xe9")
    for found in [two.save(path, lambda rank: {"x": PerRank(rank)}), two.load(path, lambda rank: {"x": PerRank(7)})]:
        assert not any(isinstance(each, Exception) for each in found), found
    assert [each["x"].value for each in found] == [0, 1]


def test_what_is_no_replica_is_refused_before_anything_is_written(job: Jobs, tmp_path: Path) -> None:
    for state, name in (
        (lambda rank: {"rng": torch.full((4,), rank)}, "rng has another content on rank 1 than on rank 0"),
        (lambda rank: {"stage": torch.ones(rank + 1)}, r"stage is float32\[1\] on rank 0, float32\[2\] on rank 1"),
        (lambda rank: {"position": rank}, "position has another value on rank 1 than on rank 0"),
    ):
        for error in job(2).save(tmp_path / "it", state):
            assert isinstance(error, ReplicaMismatch)
            with pytest.raises(ReplicaMismatch, match=rf"under one name: {name}\. Wrap in PerRank"):
                raise error
    assert not list(tmp_path.glob("it/*.safetensors"))


def own(rank: int) -> dict[str, Any]:
    return {"rng": PerRank({"state": torch.full((3,), rank), "count": rank * 10}), "shared": torch.ones(2)}


def blank(rank: int) -> dict[str, Any]:
    return {"rng": PerRank({"state": torch.full((3,), -1), "count": -1}), "shared": torch.zeros(2)}


def test_what_is_each_ranks_own_comes_back_to_it(job: Jobs, tmp_path: Path) -> None:
    fine(job(3).save(tmp_path / "it", own))
    for rank, state in enumerate(fine(job(3).load(tmp_path / "it", blank))):
        assert state["rng"].value["state"].tolist() == [rank] * 3 and state["rng"].value["count"] == rank * 10
        assert state["shared"].tolist() == [1, 1]


def test_what_is_each_ranks_own_in_another_world(job: Jobs, tmp_path: Path) -> None:
    fine(job(3).save(tmp_path / "it", own))
    two = job(2)
    for error in two.load(tmp_path / "it", blank):
        with pytest.raises(
            StateMismatch, match=r"saved by 3 ranks and is loaded by 2: whose rng\.count, rng\.state \("
        ):
            raise error
    for loaded in fine(two.load(tmp_path / "it", blank, per_rank="rank0")):
        assert loaded["rng"].value["count"] == 0 and loaded["rng"].value["state"].tolist() == [0] * 3
    for loaded in fine(two.load(tmp_path / "it", blank, per_rank="drop")):
        assert loaded["rng"].value["count"] == -1 and loaded["rng"].value["state"].tolist() == [-1] * 3
        assert loaded["shared"].tolist() == [1, 1]
    (anew,) = fine(job(1).load(tmp_path / "it", lambda rank: None, per_rank="drop"))
    assert list(anew) == ["shared"]


def reported(found: list[Any]) -> list[Any]:
    return [future.report.per_rank for future in fine(found)]


def test_the_report_says_what_became_of_each_ranks_own(job: Jobs, tmp_path: Path) -> None:
    fine(job(3).save(tmp_path / "it", own))

    def load(each: AsyncCheckpointer, rank: int, state: Any = blank, **options: Any) -> Any:
        future = each.load(tmp_path / "it", state(rank), **options)
        future.result(60)
        return future

    def anew(rank: int) -> None:
        return None

    names = ("rng.count", "rng.state")
    assert reported(job(3).each(load)) == [dict.fromkeys(names, "own")] * 3
    two = job(2)
    for state in (blank, anew):
        for option, outcome in (("rank0", "rank0"), ("drop", "dropped")):
            found = reported(two.each(partial(load, state=state, per_rank=option)))
            assert found == [dict.fromkeys(names, outcome)] * 2
            found = reported(two.each(partial(load, state=state, per_rank=option, keys=["*count", "shared"])))
            assert found == [{"rng.count": outcome}] * 2
    fewer = reported(
        two.each(partial(load, state=lambda rank: {"shared": torch.ones(2)}, per_rank="rank0", strict=False))
    )
    assert fewer == [{}] * 2  # the state asks for none


def test_a_generators_state_of_another_world_is_reported(job: Jobs, tmp_path: Path) -> None:
    fine(job(2).save(tmp_path / "it", lambda rank: {"rng": RNGState(), "x": 1}))
    (alone,) = job(1).checkpointers
    before = torch.get_rng_state()
    future = alone.load(tmp_path / "it", {"rng": RNGState(), "x": 0}, per_rank="drop")
    assert future.result(60)["x"] == 1
    report: Any = future.report
    assert set(report.per_rank.values()) == {"dropped"} and "rng.torch" in report.per_rank
    assert torch.equal(torch.get_rng_state(), before)
    future = alone.load(tmp_path / "it", {"rng": RNGState(), "x": 0}, per_rank="rank0")
    future.result(60)
    report = future.report
    assert set(report.per_rank.values()) == {"rank0"} and "rng.torch" in report.per_rank


def stage(rank: int, value: float) -> dict[str, Any]:
    return {"model": {f"layer{rank}": torch.full((4,), value)}, f"only{rank}": rank, "step": 1}


def test_keys_that_only_some_ranks_hold(job: Jobs, tmp_path: Path) -> None:
    three = job(3)
    fine(three.save(tmp_path / "it", lambda rank: stage(rank, rank)))
    for rank, state in enumerate(fine(three.load(tmp_path / "it", lambda rank: stage(rank, -1)))):
        assert state["model"][f"layer{rank}"].tolist() == [rank] * 4
    (anew,) = fine(job(1).load(tmp_path / "it", lambda rank: None))
    assert list(anew["model"]) == ["layer0", "layer1", "layer2"]
    assert [anew[f"only{rank}"] for rank in range(3)] == [0, 1, 2]
    for error in job(2).load(tmp_path / "it", lambda rank: stage(rank, -1)):
        with pytest.raises(StateMismatch, match="states of all ranks together do not match"):
            raise error


def linear(size: int, value: float) -> torch.nn.Linear:
    """One that all threads make alike: they share torch's random numbers."""
    made = torch.nn.Linear(size, size)
    for number, parameter in enumerate(made.parameters()):
        torch.nn.init.constant_(parameter, value + number / 2)
    return made


def stage_training(rank: int, stages: int, seed: int) -> dict[str, Any]:
    """Layers ``rank``, ``rank + stages`` … of four, with an optimizer that numbers its parameters from 0."""
    model = torch.nn.ModuleDict({str(number): linear(3, number * seed) for number in range(rank, 4, stages)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sum(layer(torch.ones(2, 3)).sum() for layer in model.values()).backward()
    if seed == 1:
        optimizer.step()
    return {"train": TrainState(model, optimizers=optimizer)}


def test_pipeline_stages_with_optimizers_load_as_other_stages(job: Jobs, tmp_path: Path) -> None:
    fine(job(2).save(tmp_path / "it", lambda rank: stage_training(rank, 2, 1)))
    expected = stage_training(0, 1, 1)["train"].state_dict()
    for stages in (1, 2, 4):
        states = fine(job(stages).load(tmp_path / "it", partial(stage_training, stages=stages, seed=2)))
        for state in states:
            found = state["train"].state_dict()
            for name, entries in found["optimizer"]["state"].items():
                assert torch.equal(found["model"][name], expected["model"][name])
                assert torch.equal(entries["exp_avg"], expected["optimizer"]["state"][name]["exp_avg"])


def test_a_key_more_on_one_rank_is_complete_and_a_key_less_aborts_once(job: Jobs, tmp_path: Path) -> None:
    def state(rank: int, *, less: int = -1, more: int = -1) -> dict[str, Any]:
        model = torch.nn.ModuleDict({str(number): linear(64, number) for number in range(4)})
        if rank == less:
            del model["0"], model["1"], model["2"]
        return {"model": model, **({"new": torch.ones(5)} if rank == more else {})}

    two = job(2)
    fine(two.save(tmp_path / "1", state))
    fine(two.save(tmp_path / "2", lambda rank: state(rank, more=1)))
    assert "new" in fine(job(1).load(tmp_path / "2", lambda rank: None))[0]
    for error in two.save(tmp_path / "3", lambda rank: state(rank, less=1)):
        assert type(error) is StructureChanged
        with pytest.raises(StructureChanged, match=r"leave a hole in it .* the next save is complete"):
            raise error
    fine(two.save(tmp_path / "4", lambda rank: state(rank, less=1)))
    (loaded,) = fine(job(1).load(tmp_path / "4", lambda rank: None))
    assert torch.equal(loaded["model"]["0.weight"], state(0)["model"]["0"].weight)


def test_a_changed_shape_on_one_rank_or_on_all_is_complete(job: Jobs, tmp_path: Path) -> None:
    def state(rank: int, own: tuple[int, int], shared: int) -> dict[str, Any]:
        return {
            f"of {rank}": torch.arange(float(own[rank])),
            "shared": torch.arange(float(shared)),
            "x": rows(WHOLE, rank, 2),
        }

    two = job(2)
    for number, (own, shared) in enumerate((((5, 5), 7), ((5, 9), 7), ((5, 9), 11), ((3, 3), 2))):
        path = tmp_path / str(number)
        fine(two.save(path, partial(state, own=own, shared=shared)))
        (loaded,) = fine(job(1).load(path, lambda rank: None))
        assert [len(loaded["of 0"]), len(loaded["of 1"]), len(loaded["shared"])] == [*own, shared]
        assert torch.equal(loaded["of 1"], torch.arange(float(own[1]))) and torch.equal(loaded["x"], WHOLE)


def test_replicas_whose_shape_changes_on_one_rank_are_refused_and_the_next_save_is_sound(
    job: Jobs, tmp_path: Path
) -> None:
    two = job(2)
    fine(two.save(tmp_path / "1", lambda rank: {"x": torch.ones(4)}))
    for error in two.save(tmp_path / "2", lambda rank: {"x": torch.ones(4 + rank)}):
        assert isinstance(error, (StructureChanged, ReplicaMismatch, PeerFailed)), repr(error)
    fine(two.save(tmp_path / "3", lambda rank: {"x": torch.ones(6)}))
    assert len(fine(job(1).load(tmp_path / "3", lambda rank: None))[0]["x"]) == 6


def test_a_refusal_on_one_rank_is_heard_by_all_and_the_next_save_is_sound(job: Jobs, tmp_path: Path) -> None:
    two = job(2)
    for number, path in enumerate(("1", "2")):
        if number:
            fine(two.save(tmp_path / "between", lambda rank: sharded(rank, 2)))
        refused, heard = two.save(tmp_path / path, lambda rank: {"x": torch.ones(2) if rank else object()})
        assert isinstance(refused, UnsupportedValue)
        assert isinstance(heard, PeerFailed) and heard.rank == 0
        assert "'x' is a builtins.object" in str(heard)


class Unwilling:
    def state_dict(self) -> dict[str, Any]:
        raise ValueError("not now")

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_a_state_dict_that_fails_on_one_rank_fails_the_save_of_all_at_once(job: Jobs, tmp_path: Path) -> None:
    failed, heard = job(2).save(tmp_path / "it", lambda rank: {"x": {} if rank else Unwilling()})
    assert isinstance(failed, ValueError)
    assert isinstance(heard, PeerFailed) and heard.rank == 0 and "ValueError: not now" in str(heard)


def test_a_state_dict_that_fails_on_one_rank_fails_the_load_of_all_at_once(job: Jobs, tmp_path: Path) -> None:
    two = job(2)
    fine(two.save(tmp_path / "it", lambda rank: {"x": {"y": 1}}))
    failed, heard = two.load(tmp_path / "it", lambda rank: {"x": {"y": 1} if rank else Unwilling()})
    assert isinstance(failed, ValueError)
    assert isinstance(heard, PeerFailed) and heard.rank == 0 and "ValueError: not now" in str(heard)


def test_a_load_that_fails_on_one_rank_fails_on_all_before_anything_is_taken_over(job: Jobs, tmp_path: Path) -> None:
    two = job(2)
    fine(two.save(tmp_path / "it", lambda rank: sharded(rank, 2)))
    (damaged,) = tmp_path.glob("it/*-1-0.safetensors")
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    first, second = two.load(tmp_path / "it", lambda rank: sharded(rank, 2, filled=False))
    assert type(first) is type(second) and first.rank == 1
    assert str(first).startswith("rank 1: ") and "does not match its checksum" in str(second)
