"""Parts of checkpoints, and names that meet: what is chosen comes back whole, what is ambiguous is refused or settled
by rule.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from asyncdcp import MemoryStorage
from asyncdcp.errors import InvalidOption, StateMismatch


class Held:
    """A Stateful that keeps what it is given."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


def stepped(lr: float = 0.1) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer


def test_empty_dicts_are_chosen_by_their_own_names(checkpointer):
    storage, scaler = MemoryStorage(), torch.amp.GradScaler("cpu", enabled=False)
    state = {"net": nn.Linear(2, 1), "sgd": torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.5), "scaler": scaler}
    checkpointer.save(storage, {**state, "more": {"a": {}, "b": {}}}, keys=["net.*", "sgd.*", "scaler.*", "more.a"])
    found = checkpointer.load(storage)
    assert (found["sgd"]["state"], found["scaler"], found["more"]) == ({}, {}, {"a": {}})
    fresh = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    checkpointer.load(storage, {**state, "sgd": fresh, "more": {"a": {}}})
    assert fresh.param_groups[0]["lr"] == 0.5
    assert checkpointer.load(storage, keys=["sgd.*"])["sgd"]["state"] == {}
    assert set(checkpointer.load(storage, keys=["sgd.param_groups.*"])["sgd"]) == {"param_groups"}


def test_keys_that_choose_all_of_an_optimizer_fill_a_fresh_one(into):
    fresh = torch.optim.AdamW(nn.Linear(2, 1).parameters(), lr=0.7)
    into({"optimizer": fresh, "step": 0}, {"optimizer": stepped(), "step": 5}, keys=["optimizer.*"])
    stored = stepped()
    assert fresh.param_groups[0]["lr"] == 0.1
    first, expected = fresh.state_dict()["state"][0], stored.state_dict()["state"][0]
    assert torch.equal(first["exp_avg"], expected["exp_avg"])


def test_keys_that_choose_a_part_of_an_optimizer_leave_the_rest_of_it(into):
    target, stored = stepped(lr=0.7), stepped()
    kept = target.state_dict()["state"][1]["exp_avg"].add_(3).clone()
    target.state_dict()["state"][0]["exp_avg"].zero_()
    into({"o": target}, {"o": stored}, keys=["o.state.0.*"])
    assert torch.equal(target.state_dict()["state"][0]["exp_avg"], stored.state_dict()["state"][0]["exp_avg"])
    assert torch.equal(target.state_dict()["state"][1]["exp_avg"], kept)
    assert target.param_groups[0]["lr"] == 0.7
    fresh = torch.optim.AdamW(nn.Linear(2, 1).parameters())
    with pytest.raises(StateMismatch, match=r"unexpected(.|\n)*o\.state\.0\.exp_avg"):
        into({"o": fresh}, {"o": stored}, keys=["o.state.0.*"])


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("rename", [{"a": "x"}, lambda name: "x"])
def test_a_rename_that_gives_two_tensors_one_name_is_refused(into, rename, strict):
    target = {"x": torch.zeros(2)}
    with pytest.raises(StateMismatch, match="x: rename gives this name to a and to x"):
        into(target, {"a": torch.ones(2), "x": torch.full((2,), 2.0)}, rename=rename, strict=strict)
    assert torch.equal(target["x"], torch.zeros(2))


def test_a_rename_may_join_what_is_tied_or_not_wanted(into):
    weight = torch.ones(2)
    target = {"x": torch.zeros(2)}
    into(target, {"a": weight, "b": weight}, rename=lambda name: "x")
    assert torch.equal(target["x"], weight)
    stored = {"a": weight * 2, "b": weight, "c": weight * 3}
    into(target, stored, rename=lambda name: "x" if name == "a" else "junk", strict=False)
    assert torch.equal(target["x"], weight * 2)


def test_two_names_that_differ_by_wrappers_alone_do_not_share_one(into):
    target = {"module": {"w": torch.zeros(2)}, "_orig_mod": {"w": torch.zeros(2)}}
    with pytest.raises(StateMismatch, match="missing in the checkpoint: 2"):
        into(target, {"w": torch.ones(2)})


@pytest.mark.parametrize("dotted", ["before", "after"])
def test_a_dict_whose_key_has_a_dot_does_not_stand_in_for_a_stateful(into, dotted):
    def state(value: int) -> dict[str, Any]:
        nested, other = {"a": {"b": Held({"k": value})}}, {"a.b": {"note": value}}
        return {**other, **nested} if dotted == "before" else {**nested, **other}

    target = state(0)
    into(target, state(7))
    assert target["a"]["b"].state == {"k": 7}
    assert target["a.b"] == {"note": 7}


def test_tied_tensors_take_the_last_of_several(into):
    weight = torch.zeros(3)
    first, last = torch.ones(3), torch.full((3,), 2.0)
    into({"a": weight, "b": weight, "c": torch.zeros(3)}, {"b": first, "a": last, "c": first})
    assert torch.equal(weight, first)


def test_what_is_tied_in_the_state_and_not_in_the_checkpoint_comes_back_untied_where_that_decides(into):
    one = torch.zeros(1)
    target = Held({"a": one, "b": {"c": [one]}, "d": one})
    into({"x": target}, {"x": Held({"a": torch.tensor([1.0]), "b": {"c": [torch.tensor([2.0])]}, "d": torch.ones(1)})})
    assert target.state == {"a": torch.ones(1), "b": {"c": [torch.full((1,), 2.0)]}, "d": torch.ones(1)}
    assert target.state["a"] is one
    assert target.state["d"] is not one


def test_a_sequence_of_schedulers_with_rates_as_tensors(into, same):
    def made() -> Any:
        rates = torch.optim.lr_scheduler
        optimizer = torch.optim.Adam([nn.Parameter(torch.ones(1))], lr=torch.tensor(0.1), foreach=False)
        parts = [rates.LinearLR(optimizer), rates.ExponentialLR(optimizer, 0.9)]
        return optimizer, rates.SequentialLR(optimizer, parts, [2])  # a fresh one shares a tensor with its first part

    stored, fresh = made(), made()
    for _ in range(3):
        stored[0].step()
        stored[1].step()
    into({"o": fresh[0], "s": fresh[1]}, {"o": stored[0], "s": stored[1]})
    assert same(fresh[1].state_dict(), stored[1].state_dict())


def test_several_nans_in_a_set_come_back(checkpointer):
    storage = MemoryStorage()
    checkpointer.save(storage, {"s": {float("nan"), float("nan"), float("inf")}})
    found = checkpointer.load(storage)["s"]
    assert len(found) == 3 and sum(item != item for item in found) == 2


def test_a_leaf_whose_key_has_a_dot_does_not_replace_a_dict(into):
    target = {"a": {"b": {"c": 0}}, "a.b": 0, "None": {"x": 0}, None: 0}
    into(target, {"a": {"b": {"c": 1}}, "a.b": 2, "None": {"x": 3}, None: 4})
    assert target == {"a": {"b": {"c": 1}}, "a.b": 2, "None": {"x": 3}, None: 4}


def test_a_rename_of_everything_keeps_dots_at_the_front(into):
    assert into({"..": 0, ".x": 0}, {"..": 1, ".x": 2}, rename={"": ""}) == {"..": 1, ".x": 2}
    assert into({"n": {".x": 0}}, {".x": 1}, rename={"": "n"}) == {"n": {".x": 1}}


@pytest.mark.parametrize("options", [{}, {"keys": ["*"]}, {"strict": False}])
def test_a_stateful_without_state_yet_is_none_of_anothers_whose_name_begins_its_own(into, options):
    target = {"data": Held({"at": 0}), "data_val": Held({}), "data.x": Held({}), "used": Held({"n": 1})}
    into(
        target,
        {"data": Held({"at": 1}), "data_val": Held({"a": {}}), "data.x": Held({"at": 3}), "used": Held({})},
        **options,
    )
    assert [held.state for held in target.values()] == [{"at": 1}, {"a": {}}, {"at": 3}, {}]


def test_a_stateful_in_anothers_state_is_the_others_to_load(into):
    target = {"outer": Held({"inner": Held({"n": 0})})}
    inner = target["outer"].state["inner"]
    into(target, {"outer": Held({"inner": Held({"n": 1})})})
    assert target["outer"].state == {"inner": {"n": 1}}
    assert inner.state == {"n": 0}


def test_a_rename_without_a_state_is_refused(checkpointer):
    with pytest.raises(InvalidOption, match="give load the state, too"):
        checkpointer.load(MemoryStorage(), rename={"a": "b"})
