"""States taken apart: names, alias groups, refusals."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from asyncdcp.errors import DuplicateName, UnsupportedValue
from asyncdcp.state_dict.flatten import flatten
from asyncdcp.state_dict.values import MAX_DEPTH, decode_value
from asyncdcp.stateful import PerRank, RNGState


class Counter:
    """A Stateful as users write them."""

    def __init__(self, count: Any = 0) -> None:
        self.count = count
        self.taken = 0

    def state_dict(self) -> dict[str, Any]:
        self.taken += 1
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


# ── names and tables ────────────────────────────────────────────────────────────────────────────────────────────────


def test_names_join_the_path_and_keep_the_order():
    w, b = torch.ones(2), torch.ones(1)
    flat = flatten({"z": {1: w, None: 3}, "a": [b, (True, {"k": "v"})], "l": [1, (2.0, None)]})
    assert list(flat.tensors) == ["z.1", "a.0"]
    assert flat.tensors["z.1"] is w
    assert flat.values == {"z.None": 3, "a.1.0": True, "a.1.1.k": "v", "l": [1, {"tuple": [2.0, None]}]}
    assert flat.aliases == {}
    assert flat.statefuls == {}
    assert msgspec.json.decode(msgspec.json.encode(flat.tree)) == flat.tree


def test_a_single_leaf_has_the_empty_name():
    tensor = torch.ones(1)
    assert flatten(tensor).tensors == {"": tensor}
    assert flatten(5).values == {"": 5}
    assert list(flatten({"": {"": {"a": tensor}}}).tensors) == ["a"]


def test_the_tree_tells_structures_apart_and_not_contents():
    def tree(state: Any) -> Any:
        return flatten(state).tree

    assert tree({"a": torch.ones(1), "n": 1}) == tree({"a": torch.zeros(5), "n": 2.5})
    assert tree({"loss": [1.0]}) == tree({"loss": [1.0, 2.0]})
    for one, other in [
        ({1: {}}, {True: {}}),
        ({1: {}}, {1.0: {}}),
        ({(1,): {}}, {(True,): {}}),
        ({0.0: {}}, {-0.0: {}}),
        ({"a": {}}, {"a": OrderedDict()}),
        ({"a": [{}]}, {"a": ({},)}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": defaultdict(list)}, {"a": defaultdict(int)}),
        (PerRank({}), {}),
    ]:
        assert tree(one) != tree(other)


def test_metadata_of_a_modules_state_dict_is_part_of_the_tree():
    one, other = nn.BatchNorm1d(2).state_dict(), nn.BatchNorm1d(2).state_dict()
    assert flatten(one).tree == flatten(other).tree
    other._metadata[""]["version"] = True  # type: ignore[attr-defined]  # nn.Module's own
    assert flatten(one).tree != flatten(other).tree


def test_statefuls_are_asked_once_and_listed_in_order():
    b, a = Counter(1), Counter({"inner": Counter(2)})
    flat = flatten({"b": b, "a": [a], "p": PerRank(Counter(3))})
    assert list(flat.statefuls) == ["b", "a.0", "a.0.count.inner", "p"]
    assert flat.statefuls["b"].stateful is b
    assert (a.taken, b.taken) == (1, 1)
    assert flat.values == {"b.count": 1, "a.0.count.inner.count": 2, "p.count": 3}
    assert flat.tree == {
        "dict": [
            ["b", "a", "p"],
            [
                {"stateful": {"dict": [["count"], [{"v": "b.count"}]]}},
                {
                    "list": [
                        {
                            "stateful": {
                                "dict": [
                                    ["count"],
                                    [
                                        {
                                            "dict": [
                                                ["inner"],
                                                [{"stateful": {"dict": [["count"], [{"v": "a.0.count.inner.count"}]]}}],
                                            ]
                                        }
                                    ],
                                ]
                            }
                        }
                    ]
                },
                {"per_rank": {"stateful": {"dict": [["count"], [{"v": "p.count"}]]}}},
            ],
        ]
    }


def test_rng_state_is_per_rank_by_itself():
    tree = flatten(RNGState()).tree
    assert list(tree) == ["per_rank"]
    assert list(tree["per_rank"]) == ["stateful"]


def test_a_class_is_not_a_stateful():
    with pytest.raises(UnsupportedValue, match=r"'model' is a builtins\.type"):
        flatten({"model": nn.Linear})


def test_plain_values_are_encoded_before_flatten_returns():
    history = [1, 2]
    flat = flatten({"h": history, "d": deque([1])})
    history.append(3)
    assert decode_value(flat.values["h"]) == [1, 2]


# ── alias groups ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ties_keep_their_first_name():
    weight = nn.Parameter(torch.ones(3, 2))
    flat = flatten({"a": weight, "b": [weight.detach(), weight.data], "c": weight.view(3, 2)})
    assert list(flat.tensors) == ["a"]
    assert flat.aliases == {"b.0": "a", "b.1": "a", "c": "a"}


def test_tied_embeddings_of_a_module():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    flat = flatten({"model": model})
    assert list(flat.tensors) == ["model.embed.weight"]
    assert flat.aliases == {"model.head.weight": "model.embed.weight"}


def test_what_only_overlaps_is_its_own():
    base = torch.arange(12.0)
    views = {
        "base": base,
        "rows": base.view(3, 4),
        "columns": base.view(4, 3),
        "start": base[:6],
        "transposed": base.view(3, 4).t(),
        "square": base[:9].view(3, 3),
        "square_t": base[:9].view(3, 3).t(),
        "bits": base.view(torch.int32),
        "copy": base.clone(),
        "tail": base[6:],
    }
    again = {f"{name}_again": view.detach() for name, view in views.items()}
    flat = flatten({**views, **again})
    assert list(flat.tensors) == list(views)
    assert flat.aliases == {f"{name}_again": name for name in views}


def test_conj_and_neg_views_are_their_own():
    z = torch.randn(3, dtype=torch.complex64)
    flat = flatten({"z": z, "conj": z.conj(), "neg": z.conj().imag, "imag": z.imag, "conj_again": z.conj()})
    assert list(flat.tensors) == ["z", "conj", "neg", "imag"]
    assert flat.aliases == {"conj_again": "conj"}


def test_empty_tensors_are_never_tied():
    empty = torch.empty(0, 3)
    flat = flatten({"a": empty, "b": empty, "c": torch.empty(0)})
    assert list(flat.tensors) == ["a", "b", "c"]


def test_expanded_zero_dimensional_and_inference_tensors():
    with torch.inference_mode():
        inferred = torch.ones(2)
    state = {"expanded": torch.ones(1).expand(1000), "zero": torch.tensor(1.0), "inferred": inferred}
    assert list(flatten(state).tensors) == list(state)


# ── refusals, besides those of README's table (tests/error_cases/states.py) ───────────────────────────────────────────


def _jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


def _functional() -> torch.Tensor:
    made: list[torch.Tensor] = []

    def keep(row: torch.Tensor) -> torch.Tensor:
        made.append(row)
        return row

    torch.func.vmap(keep)(torch.ones(2, 3))
    return made[0]


def _fake() -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(2)


REFUSED = [
    (lambda: nn.Parameter(torch.ones(2, device="meta")), r"torch\.nn\.parameter\.Parameter.*meta.*to_empty"),
    (lambda: torch.empty(0, device="meta"), "meta"),
    (_jagged, r"NestedTensor.*nested"),
    (_functional, "no memory"),
    (lambda: torch._efficientzerotensor(3), "no memory"),
    (_fake, "FakeTensor"),
    (lambda: nn.UninitializedParameter(), r"UninitializedParameter.*lazy module's.*one batch first"),
    (lambda: nn.UninitializedBuffer(), "lazy module's"),
    (lambda: defaultdict(lambda: 1), "default_factory"),
    (object, r"builtins\.object"),
]


@pytest.mark.parametrize(("make", "said"), REFUSED, ids=[said[:20] for _, said in REFUSED])
def test_what_cannot_be_stored_is_refused(make, said):
    value = make()
    with pytest.raises(UnsupportedValue, match=rf"'m\.0\.x' is a .*{said}") as caught:
        flatten({"m": [{"x": value}]})
    assert "allow_pickle=True" in str(caught.value)
    assert caught.value.tensors == ("m.0.x",)


def test_with_allow_pickle_tensors_too_are_pickled():
    sparse = torch.eye(2).to_sparse()
    flat = flatten({"s": sparse, "o": {"r": range(3)}, "c": copy.copy}, allow_pickle=True)
    assert flat.tensors == {}
    assert decode_value(flat.values["c"], allow_pickle=True) is copy.copy
    found = decode_value(flat.values["s"], allow_pickle=True)
    assert torch.equal(found.to_dense(), torch.eye(2))
    with pytest.raises(UnsupportedValue, match="cannot be pickled either"):
        flatten({"f": lambda: 1}, allow_pickle=True)


@pytest.mark.parametrize(
    "key", [b"a", (1, b"a"), torch.float32, frozenset(), "\ud800", ("\ud800",), type("K", (str,), {})("k")]
)
def test_keys_of_other_types_are_refused(key):
    with pytest.raises(UnsupportedValue, match=r"^state\['d'\] has the key .*, which is a "):
        flatten({"d": {key: torch.ones(1)}})


DUPLICATES = [
    ({"a": {"b": 1}, "a.b": 2}, "state['a']['b'] and state['a.b'] "),
    ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "state['a.b'] and state['a']['b'] "),
    ({"d": {1: 2, "1": 3}}, "state['d'][1] and state['d']['1'] "),
    ({"a": [{}, torch.ones(1)], "a.1": 5}, "state['a'][1] and state['a.1'] "),
    ({"m": Counter(1), "m.count": 2}, "state['m'].state_dict()['count'] and state['m.count'] "),
    ({"p": {"q": PerRank(3)}, "p.q": 2}, "state['p']['q'].value and state['p.q'] "),
    ({"a.b": Counter(1), "a": {"b": Counter({})}}, "state['a.b'] and state['a']['b'] "),
    ({None: 1, "None": 1}, "state[None] and state['None'] "),
]


@pytest.mark.parametrize(("state", "paths"), DUPLICATES, ids=[paths for _, paths in DUPLICATES])
def test_two_entries_of_one_name(state, paths):
    with pytest.raises(DuplicateName) as caught:
        flatten(state)
    assert str(caught.value).startswith(paths + "have the same fully qualified name '")


def test_cycles_and_depth():
    dicts: dict[str, Any] = {"t": torch.ones(1)}
    dicts["inner"] = [{"again": dicts}]
    with pytest.raises(UnsupportedValue, match=r"^state\['inner'\]\[0\]\['again'\] is a container that holds itself$"):
        flatten(dicts)
    plain: list[Any] = [1]
    plain.append(plain)
    with pytest.raises(UnsupportedValue, match="holds itself"):
        flatten({"l": plain})
    looped = PerRank[Any](None)
    looped.value = looped
    with pytest.raises(UnsupportedValue, match="holds itself"):
        flatten(looped)

    class Endless(Counter):
        def state_dict(self) -> Any:
            return {"x": Endless()}

    with pytest.raises(UnsupportedValue, match=f"nested deeper than {MAX_DEPTH}"):
        flatten({"s": Endless()})
    shared = {"x": 1}
    assert list(flatten({"a": shared, "b": shared}).values) == ["a.x", "b.x"]


def test_the_same_stateful_twice_is_two_entries():
    counter = Counter(1)
    assert list(flatten({"a": counter, "b": counter}).statefuls) == ["a", "b"]
