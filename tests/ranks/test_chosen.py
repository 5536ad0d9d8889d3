"""``keys=`` on several ranks: each has to match something on one of them; the others may hold nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncdcp.errors import InvalidOption
from tests.ranks.conftest import Job

Jobs = Callable[..., Job]


def stage(rank: int) -> dict[str, Any]:
    return {"model": {f"layer{rank}": torch.full((4,), rank)}, f"only{rank}": rank, "step": 1}


def fine(results: list[Any]) -> list[Any]:
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_chosen_keys_that_only_some_ranks_hold(job: Jobs, tmp_path: Path) -> None:
    fine(job(3).save(tmp_path / "it", stage, keys=["*.layer0", "*.layer1", "only2"]))
    (anew,) = fine(job(1).load(tmp_path / "it", lambda rank: None))
    assert (list(anew["model"]), anew["only2"], len(anew)) == (["layer0", "layer1"], 2, 2)


def adapted(rank: int, value: float = 7) -> dict[Any, Any]:
    """Only rank 1 has an adapter, and what is empty."""
    if rank != 1:
        return {"model": {"frozen": torch.ones(2)}, "list": [torch.ones(1)], (1, "a"): {True: {}}}
    return {"model": {"lora": torch.full((3,), value), "frozen": torch.ones(2)}, (2, "b"): {1.5: {}, 1 << 70: {}}}


def test_ranks_that_hold_nothing_of_what_is_chosen(job: Jobs, tmp_path: Path) -> None:
    three, adapters, empty = job(3), ["*.lora"], ["(2, 'b').1.5", f"(2, 'b').{1 << 70}.*"]
    fine(three.save(tmp_path / "adapters", adapted, keys=adapters))
    fine(three.save(tmp_path / "empty", adapted, keys=empty))
    states = fine(three.load(tmp_path / "adapters", lambda rank: adapted(rank, 0), keys=adapters))
    assert states[1]["model"]["lora"].tolist() == [7, 7, 7]
    (anew,) = fine(job(1).load(tmp_path / "adapters", lambda rank: None))
    assert list(anew) == ["model"] and anew["model"]["lora"].tolist() == [7, 7, 7]
    (anew,) = fine(job(1).load(tmp_path / "empty", lambda rank: None))
    assert anew == {(2, "b"): {1.5: {}, 1 << 70: {}}}


def test_states_that_are_a_module_and_hold_nothing_of_what_is_chosen(job: Jobs, tmp_path: Path) -> None:
    layers = [torch.nn.ModuleDict({f"layer{rank}": torch.nn.Linear(2, 2)}) for rank in range(2)]
    fine(job(2).save(tmp_path / "it", layers.__getitem__, keys=["layer1.*"]))
    (anew,) = fine(job(1).load(tmp_path / "it", lambda rank: None))
    assert list(anew) == ["layer1.weight", "layer1.bias"]


def test_chosen_keys_that_no_rank_holds_are_refused_on_all(job: Jobs, tmp_path: Path) -> None:
    two = job(2)
    for keys in (["*.layer1", "only9"], ["only9"]):  # at the first save the ranks agree, at the next they do not
        for error in two.save(tmp_path / "it", stage, keys=keys):
            words = r"keys=\['only9'\] match nothing in the state of any rank; the globs are of whole FQNs"
            with pytest.raises(InvalidOption, match=words):
                raise error
    assert not list(tmp_path.glob("it/*.safetensors"))
    fine(two.save(tmp_path / "it", stage, keys=["*.layer1"]))


def test_a_list_of_globs_that_changes_after_the_call_changes_nothing(job: Jobs, tmp_path: Path) -> None:
    two, keys = job(2), ["*.layer0"]
    first = two.checkpointers[0].save(tmp_path / "it", stage(0), keys=keys)
    keys[:] = ["only9"]  # before rank 1 comes, and so before they agree
    second = two.checkpointers[1].save(tmp_path / "it", stage(1), keys=["*.layer0"])
    assert first.result(60).save_id == second.result(60).save_id
