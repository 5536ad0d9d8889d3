"""Loads into a state that is there: what stays, what is replaced, what is refused."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import pytest
import torch
from torch import nn

from asyncdcp import MemoryStorage, Options, PerRank
from asyncdcp.errors import InvalidOption, StateMismatch, UnsupportedValue


class Recorder:
    """A Stateful that writes down what it is given."""

    def __init__(self, state: Any, log: list[Any] | None = None) -> None:
        self.state = state
        self.log = [] if log is None else log

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state_dict: Any) -> None:
        self.log.append((self, state_dict))


def test_containers_and_tensors_of_the_target_stay(into):
    weight, history = torch.zeros(2), [1]
    inner: dict[Any, Any] = defaultdict(list, {1: 0})
    second = torch.zeros(2)
    nested = [second, {"x": 0}]
    target = {"w": weight, "inner": inner, "nested": nested, "history": history, "t": (1, 2)}
    other = {"w": torch.ones(2), "inner": {1: 5}, "nested": [torch.ones(2), {"x": 7}], "history": [1, 2, 3], "t": (3,)}
    assert into(target, other) is target
    assert target["w"] is weight
    assert torch.equal(weight, torch.ones(2))
    assert target["inner"] is inner
    assert inner == {1: 5}
    assert target["nested"] is nested
    assert nested[0] is second
    assert torch.equal(second, torch.ones(2))
    assert nested[1] == {"x": 7}
    assert target["history"] is history
    assert history == [1, 2, 3]
    assert target["t"] == (3,)


def test_a_tuple_is_made_anew_only_where_something_in_it_was(into):
    first, second = torch.zeros(1), torch.zeros(1)
    kept, changed = (first, {"x": 1}), (second, 5)
    target = {"kept": kept, "changed": changed}
    into(target, {"kept": (torch.ones(1), {"x": 2}), "changed": (torch.ones(1), 6)})
    assert target["kept"] is kept
    assert kept[1] == {"x": 2}
    assert target["changed"] == (second, 6)
    assert target["changed"][0] is second


def test_statefuls_are_given_their_part_in_the_targets_order(into):
    log: list[Any] = []
    first, second, third = Recorder({"x": 1}, log), Recorder({"y": 1}, log), Recorder({"n": 0}, log)
    target = {"second": second, "list": [first], "p": PerRank(third)}
    stored = {"p": PerRank(Recorder({"n": 9})), "list": [Recorder({"x": [2, {}]})], "second": {"y": (3,), "new": 4}}
    into(target, stored)
    assert log == [(second, {"y": (3,), "new": 4}), (first, {"x": [2, {}]}), (third, {"n": 9})]


def test_an_empty_state_is_handed_over_too(into):
    recorder = Recorder({})
    into({"r": recorder, "a": 1}, {"r": Recorder({}), "a": 2})
    assert recorder.log == [(recorder, {})]


def test_statefuls_within_a_stateful_are_its_own_affair(into):
    inner = Recorder({"x": 1})
    outer = Recorder({"inner": inner, "y": 1})
    into({"outer": outer}, {"outer": Recorder({"inner": Recorder({"x": 5}), "y": 6})})
    assert outer.log == [(outer, {"inner": {"x": 5}, "y": 6})]
    assert inner.log == []


def test_marks_may_be_on_one_side_only(into):
    marked = PerRank(1)
    target = {"a": marked, "b": 2, "c": {"x": 1}, "d": PerRank({"y": 1})}
    into(target, {"a": 5, "b": PerRank(6), "c": Recorder({"x": 7}), "d": PerRank({"y": 8})})
    assert target == {"a": PerRank(5), "b": 6, "c": {"x": 7}, "d": PerRank({"y": 8})}
    assert target["a"] is marked


def test_a_plain_modules_state_takes_the_checkpoints_versions(into):
    target, saved = nn.BatchNorm1d(2).state_dict(), nn.BatchNorm1d(2).state_dict()
    saved._metadata[""]["version"] = 1  # type: ignore[attr-defined]  # nn.Module's own
    assert isinstance(target, OrderedDict)
    into({"m": target}, {"m": saved})
    assert target._metadata == {"": {"version": 1}}  # type: ignore[attr-defined]  # nn.Module's own


MISMATCHES: list[tuple[Any, Any, dict[str, list[str]]]] = [
    ({"a": 1}, {}, {"missing": ["a"]}),
    ({}, {"a": 1}, {"unexpected": ["a"]}),
    ({"l": [{"x": 1}, {"x": 1}]}, {"l": [{"x": 1}]}, {"missing": ["l.1.x"]}),
    ({"a": 1}, {"a": torch.ones(1)}, {"mismatched": ["a"]}),
    ({"a": torch.ones(1)}, {"a": 1}, {"mismatched": ["a"]}),
    ({"a": torch.ones(2)}, {"a": torch.ones(3)}, {"mismatched": ["a"]}),
    ({"a": torch.ones(2)}, {"a": torch.ones(2).half()}, {"mismatched": ["a"]}),
    ({"a": {"x": 1}}, {"a": 1}, {"missing": ["a.x"], "unexpected": ["a"]}),
    ({"o": Recorder({"x": 1}), "a": 1}, {"a": 1}, {"missing": ["o"]}),
    ({"m": nn.Linear(2, 2)}, {"m": nn.Linear(2, 2, bias=False)}, {"missing": ["m.bias"]}),
    ({"m": nn.Linear(2, 2, bias=False)}, {"m": nn.Linear(2, 2)}, {"unexpected": ["m.bias"]}),
    ({"m": nn.Linear(2, 3)}, {"m": nn.Linear(2, 2)}, {"mismatched": ["m.weight", "m.bias"]}),
]


@pytest.mark.parametrize(("target", "state", "fields"), MISMATCHES, ids=range(len(MISMATCHES)))
def test_mismatches_are_all_listed(into, target, state, fields):
    with pytest.raises(StateMismatch, match="nothing was read") as caught:
        into(target, state)
    found = {name: list(getattr(caught.value, name)) for name in ("missing", "unexpected", "mismatched")}
    assert {name: names for name, names in found.items() if names} == fields


def test_a_near_miss_is_named(into):
    with pytest.raises(StateMismatch, match=r"encoder\.weight  \(did you mean encoder\.weights\?\)"):
        into({"encoder": {"weight": torch.ones(1)}}, {"encoder": {"weights": torch.ones(1)}})


def test_without_strict_what_one_side_lacks_is_left_alone(into):
    target = {"a": 1, "b": {"x": 1}, "l": [{"y": 1}, {"y": 2}], "t": ({"z": 1},)}
    into(target, {"b": {"x": 2, "new": 3}, "l": [{"y": 5}], "t": ({"z": 6}, {}), "c": 4}, strict=False)
    assert target == {"a": 1, "b": {"x": 2}, "l": [{"y": 5}, {"y": 2}], "t": ({"z": 6},)}


def test_a_module_that_matches_in_part_without_strict(into):
    model, other = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    before = model.bias.detach().clone()
    into({"m": model}, {"m": other}, strict=False)
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, before)


def test_cast_converts_only_where_it_is_allowed(into):
    stored = {"a": torch.linspace(0, 1, 7), "s": torch.arange(6.0).view(2, 3)}
    target = {"a": torch.zeros(7, dtype=torch.bfloat16), "s": torch.zeros(3, 2, dtype=torch.float64).t()}
    into(target, stored, cast="allow")
    assert torch.equal(target["a"], stored["a"].bfloat16())
    assert torch.equal(target["s"], stored["s"].double())


VIEWS = {
    "unfolded": (lambda base: base[:6].unfold(0, 3, 1), False),
    "expanded": (lambda base: base[:3].expand(2, 3), False),
    "of every other": (lambda base: base[:12].view(6, 2).t()[:, ::2], True),
    "its own diagonal": (lambda base: base[:9].view(3, 3).diagonal(), True),
    "with steps of no size": (lambda base: base.as_strided((1, 3, 1), (1, 2, 0)), True),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_a_target_whose_elements_share_memory_is_refused(into, kind):
    """They were written over each other, in no order."""
    view, sound = VIEWS[kind]
    target = view(torch.zeros(20))
    stored = torch.arange(float(target.numel())).view(target.shape)
    if sound:
        into({"x": target}, {"x": stored})
        assert torch.equal(target, stored)
        return
    with pytest.raises(StateMismatch, match="some of its elements in the state share memory"):
        into({"x": target}, {"x": stored})
    assert torch.equal(into({"x": target}, {"x": stored}, assign=True)["x"], stored)


def test_rename_by_prefix_and_by_function(into):
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    into({"model": {"head": model}}, {"net": {"out": other}}, rename={"net.out": "model.head"})
    assert torch.equal(model.weight, other.weight)
    recorder = Recorder({"x": 1})
    into({"b": recorder}, {"a": Recorder({"x": 2, "y": [torch.ones(1), {}]})}, rename=lambda name: "b" + name[1:])
    assert recorder.log[0][1]["x"] == 2


@pytest.mark.parametrize(("stored", "target", "rename"), [(0, 1, {"": "model"}), (1, 0, {"model": ""})])
def test_rename_with_nothing_stands_for_all(into, stored, target, rename):
    """As with convert: a folder of Hugging Face has no name in front, a state mostly has."""
    linears = [nn.Linear(2, 2), nn.Linear(2, 2)]
    shapes = [dict, lambda state: {"model": state}]
    into(shapes[target](dict(linears[0].named_parameters())), shapes[stored](linears[1].state_dict()), rename=rename)
    assert torch.equal(linears[0].weight, linears[1].weight)


def test_assign_replaces_bare_tensors(into):
    old = torch.zeros(2, dtype=torch.half)
    target = {"a": old, "m": torch.empty(2, device="meta")}
    into(target, {"a": torch.ones(2), "m": torch.full((2,), 3.0)}, assign=True)
    assert target["a"] is not old
    assert torch.equal(target["a"], torch.ones(2))
    assert torch.equal(target["m"], torch.full((2,), 3.0))


def test_keys_load_a_part_anew(checkpointer):
    storage = MemoryStorage()
    weight = torch.ones(2)
    checkpointer.save(
        storage, {"model": {"w": weight, "tied": weight, "b": torch.zeros(1)}, "step": 3, "l": [{"x": 1}]}
    )
    assert checkpointer.load(storage, keys=["model.tied"]) == {"model": {"tied": pytest.approx(torch.ones(2))}}
    assert checkpointer.load(storage, keys=["step", "l*"]) == {"step": 3, "l": [{"x": 1}]}
    with pytest.raises(StateMismatch, match=r"    optm\.\*: keys that match nothing in the checkpoint"):
        checkpointer.load(storage, keys=["step", "optm.*"])
    assert checkpointer.load(storage, keys=["step", "optm.*"], strict=False) == {"step": 3}


def test_keys_that_match_nothing_are_an_error(into):
    with pytest.raises(StateMismatch, match="match nothing"):
        into({"a": 1}, {"a": 2}, keys=["b*"])


def test_one_of_several_keys_that_matches_nothing_is_an_error_unless_not_strict(into):
    scaler = torch.amp.GradScaler("cpu", enabled=False)  # its state is empty
    target, stored = ({"model": nn.Linear(2, 2), "optim": {"lr": lr}, "scaler": scaler} for lr in (1, 2))
    with pytest.raises(StateMismatch, match=r"  different: 1\n    optm\.\*: keys that match nothing in the checkpoint"):
        into(target, stored, keys=["model.*", "optm.*"])
    assert target["optim"] == {"lr": 1}
    with pytest.raises(StateMismatch, match=r"  different: 1\n    model: keys that match nothing in the checkpoint"):
        into(target, stored, keys=["model", "optim.*"])  # what is in the model has longer names
    into(target, stored, keys=["model.*", "optm.*"], strict=False)
    into(target, stored, keys=["model.*", "optim.*", "scaler.*"])
    assert target["optim"] == {"lr": 2}


def test_pickles_are_refused_on_both_sides_unless_allowed(checkpointer):
    storage = MemoryStorage()
    with pytest.raises(UnsupportedValue, match="allow_pickle=True"):
        checkpointer.save(storage, {"f": nn.ReLU})
    checkpointer.save(storage, {"f": nn.ReLU}, allow_pickle=True)
    for target in (None, {"f": None}):
        with pytest.raises(UnsupportedValue, match="was saved as a pickle"):
            checkpointer.load(storage, target)
        assert checkpointer.load(storage, target, allow_pickle=True) == {"f": nn.ReLU}


def test_a_module_may_have_pickles_in_its_metadata(checkpointer):
    class Odd(nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: Any) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination._metadata[prefix[:-1]]["made_by"] = nn.ReLU

    storage, model = MemoryStorage(), Odd(2, 2)
    checkpointer.save(storage, {"m": model, "s": model.state_dict()}, allow_pickle=True)
    found: dict[str, Any] = {"m": Odd(2, 2), "s": Odd(2, 2).state_dict()}
    with pytest.raises(UnsupportedValue, match="allow_pickle=True"):
        checkpointer.load(storage, found)
    checkpointer.load(storage, found, allow_pickle=True)
    assert torch.equal(found["m"].weight, model.weight) and torch.equal(found["s"]["weight"], model.weight)
    assert found["s"]._metadata[""] == {"version": 1, "made_by": nn.ReLU}


@pytest.mark.parametrize("wrong", [{"cast": "maybe"}, {"keys": "model.*"}])
def test_wrong_options_are_refused_by_name(into, wrong):
    with pytest.raises(InvalidOption, match=next(iter(wrong))):
        into({"a": 1}, {"a": 1}, **wrong)


def test_a_wrong_option_of_the_checkpointer():
    with pytest.raises(InvalidOption, match="when_busy"):
        Options(when_busy="never")  # type: ignore[arg-type]  # that is the point
