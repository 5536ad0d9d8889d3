"""States put together again: round trips, in place, from hostile trees."""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from asyncdcp.errors import AsyncDCPError, CorruptCheckpoint, UnsupportedValue
from asyncdcp.state_dict.flatten import FlatState, flatten
from asyncdcp.state_dict.unflatten import unflatten
from asyncdcp.state_dict.values import MAX_DEPTH
from asyncdcp.stateful import PerRank, RNGState


class Box:
    def __init__(self, content: Any) -> None:
        self.content = content

    def state_dict(self) -> Any:
        return self.content

    def load_state_dict(self, state_dict: Any) -> None:
        raise AssertionError("the caller's to do")


def stored(flat: FlatState, *, copies: bool = True) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    """Tree, tensors and values as a load sees them: through JSON, tensors copied, aliases among the tensors."""
    tree, values = msgspec.json.decode(msgspec.json.encode([flat.tree, flat.values]))
    tensors = {name: t.detach().clone() if copies else t for name, t in flat.tensors.items()}
    tensors.update({name: tensors[origin] for name, origin in flat.aliases.items()})
    return tree, tensors, values


def again(state: Any) -> Any:
    return unflatten(*stored(flatten(state)))


# ── anew ────────────────────────────────────────────────────────────────────────────────────────────────────────────

_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float8_e5m2])
_shapes = st.lists(st.integers(0, 3), max_size=3)
_tensors = st.one_of(
    st.builds(lambda shape, dtype: torch.ones(shape).to(dtype), _shapes, _dtypes),
    st.builds(lambda n: torch.arange(12).view(3, 4)[:, :n], st.integers(0, 4)),
    st.builds(lambda n: torch.arange(float(n)).view(1, n).expand(2, n), st.integers(0, 4)),
)
_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.just(torch.Size([2, 3])),
    st.just(torch.float16),
    st.builds(np.float64, st.floats()),
    st.builds(np.arange, st.integers(0, 4)),
    st.builds(deque, st.lists(st.integers(), max_size=3)),
    st.builds(Counter, st.text("ab", max_size=4)),
)
_keys = st.recursive(
    st.text("ab_é", min_size=1, max_size=4) | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=2).map(tuple),
    max_leaves=3,
)


def _unique_names(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    return dict({str(key): (key, value) for key, value in pairs}.values())


def _nest(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    items = st.lists(inner, max_size=3)
    pairs = st.lists(st.tuples(_keys, inner), max_size=3).map(_unique_names)
    return st.one_of(
        items,
        items.map(tuple),
        pairs,
        pairs.map(OrderedDict),
        pairs.map(lambda found: defaultdict(list, found)),
    )


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.recursive(_tensors | _values, _nest, max_leaves=15))
def test_what_comes_back_equals_what_went_in(same, state):
    assert same(again(state), state)


def test_ties_come_back_as_one_tensor():
    weight = torch.ones(2)
    found = again({"a": weight, "b": (weight, weight.clone())})
    assert found["a"] is found["b"][0]
    assert found["a"] is not found["b"][1]


def test_a_real_modules_state_dict_keeps_its_metadata(same):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.MultiheadAttention(4, 2), nn.Conv2d(1, 2, 3))
    state = model.state_dict()
    found = again({"model": state})["model"]
    assert type(found) is OrderedDict
    assert same(found, state)
    assert vars(found)["_metadata"]["0"] == {"version": 2}
    assert same(again({"model": model})["model"], state)
    model.load_state_dict(found)


def test_marks_come_back_as_what_they_held():
    assert again({"s": Box({"x": 1}), "p": PerRank(Box([PerRank({"y": 2})]))}) == {"s": {"x": 1}, "p": [{"y": 2}]}


def test_requires_grad_is_not_kept_and_the_source_is_not_touched():
    weight = nn.Parameter(torch.ones(2))
    assert not again({"w": weight})["w"].requires_grad
    assert weight.requires_grad


def test_pickles_only_where_they_are_allowed():
    flat = flatten({"a": nn.ReLU, "b": 1}, allow_pickle=True)
    assert unflatten(*stored(flat), allow_pickle=True) == {"a": nn.ReLU, "b": 1}
    with pytest.raises(UnsupportedValue, match="'a' was saved as a pickle"):
        unflatten(*stored(flat))


@pytest.mark.parametrize("kind", ["dict", "list", "mixed", "both"])
def test_the_deepest_state_that_is_taken_comes_back(kind):
    state: Any = torch.ones(1)
    if kind == "both":  # a value as deep as may be, in a tree as deep as may be
        state = None
        for _ in range(MAX_DEPTH):
            state = deque([state])
    for level in range(MAX_DEPTH):
        state = [state] if kind == "list" or (kind == "mixed" and level % 2) else {"k": state}
    flat = flatten(state)
    assert list(unflatten(*stored(flat))) == list(state)
    with pytest.raises(UnsupportedValue, match="nested deeper"):
        flatten([state])


def test_an_rng_state_as_deep_as_may_be():
    state: Any = RNGState()
    for _ in range(MAX_DEPTH - 4):
        state = [state]
    again(state)


# ── hostile trees ───────────────────────────────────────────────────────────────────────────────────────────────────


def _deep(tag: str, depth: int) -> Any:
    node: Any = {"v": "v"}
    for _ in range(depth):
        node = {tag: [node]} if tag == "list" else {tag: node} if tag == "stateful" else {"dict": [["k"], [node]]}
    return node


HOSTILE: list[Any] = [
    None,
    5,
    [],
    {},
    {"t": 5},
    {"t": "v"},
    {"v": "t"},
    {"v": None},
    {"v": "v", "t": "t"},
    {"x": "v"},
    {"list": {}},
    {"list": ["v"]},
    {"list": [{"v": "v"}, {"v": "v"}]},
    {"tuple": [{"t": "t"}, {"t": "t"}]},
    {"dict": []},
    {"dict": [["a"], []]},
    {"dict": [[], [{"v": "v"}]]},
    {"dict": [["a", "a"], [{"v": "v"}, {"t": "t"}]]},
    {"dict": [[[1]], [{"v": "v"}]]},
    {"dict": [[1.5], [{"v": "v"}]]},
    {"dict": [[True], [{"v": "v"}]]},
    {"dict": [[{"bool": 1}], [{"v": "v"}]]},
    {"dict": [[{"float": "x"}], [{"v": "v"}]]},
    {"dict": [[{"float": "0x1p99999"}], [{"v": "v"}]]},
    {"dict": [[{"int": "zz"}], [{"v": "v"}]]},
    {"dict": [[{"tuple": [[1]]}], [{"v": "v"}]]},
    {"dict": [[{"tuple": 1}], [{"v": "v"}]]},
    {"dict": [[{"bytes": "YQ=="}], [{"v": "v"}]]},
    {"dict": [[{}], [{"v": "v"}]]},
    {"dict": [["a"], ["v"]]},
    {"dict": ["a", [{"v": "v"}]]},
    {"dict": [["a"], [{"v": "v"}]], "metadata": "1"},
    {"ordered": [[], []], "metadata": 5},
    {"ordered": [[], []], "metadata": "{"},
    {"ordered": [[], []], "metadata": "[" * 100_000},
    {"ordered": [[], []], "metadata": '{"unknown": 1}'},
    {"ordered": [[], []], "factory": "list"},
    {"defaultdict": [[], []]},
    {"defaultdict": [[], []], "factory": "os.system"},
    {"defaultdict": [[], []], "factory": ["list"]},
    {"defaultdict": [[], []], "factory": "list", "metadata": "1"},
    {"metadata": "1"},
    {"stateful": None},
    {"per_rank": [{"v": "v"}]},
    _deep("list", 5000),
    _deep("dict", MAX_DEPTH + 2),
    _deep("stateful", 5000),
]


@pytest.mark.parametrize("tree", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_tree_is_a_corrupt_checkpoint(tree):
    tensors, values = {"t": torch.ones(1)}, {"v": 1}
    with pytest.raises(CorruptCheckpoint, match=r"^(the tree|the value '_metadata' is) .{1,300}$"):
        unflatten(tree, tensors, values)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["t", "v", "list", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["t", "v", "list", "tuple", "dict", "ordered", "defaultdict", "stateful", "factory", "metadata"]
            ),
            inner,
            min_size=1,
            max_size=2,
        )
    ),
    max_leaves=8,
)


@settings(derandomize=True, deadline=None, max_examples=500)
@given(_json)
def test_any_json_as_a_tree_is_built_or_refused(tree):
    for tables in (({"t": torch.ones(1)}, {"v": 1}), ({}, {})):
        with contextlib.suppress(AsyncDCPError):
            unflatten(tree, *tables)
