"""Tensor subclasses with ``__tensor_flatten__``: stored as inner tensors, loaded into targets of the same class."""

from __future__ import annotations

import enum
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from asyncdcp import MemoryStorage, SyncCheckpointer
from asyncdcp.errors import AsyncDCPError, CorruptCheckpoint, StateMismatch, UnsupportedValue
from asyncdcp.state_dict.flatten import flatten
from asyncdcp.state_dict.nodes import TreeNodes
from asyncdcp.state_dict.subclasses import context_text


class Scaled(Tensor):
    """``packed * scale``; what computes with it gets a plain tensor, what moves it about keeps it."""

    packed: Tensor
    scale: Tensor
    note: Any

    @staticmethod
    def __new__(cls, packed: Tensor, scale: Tensor, note: Any = "none") -> Scaled:
        made: Scaled = Tensor._make_wrapper_subclass(cls, packed.shape, dtype=scale.dtype, device=packed.device)
        made.packed, made.scale, made.note = packed, scale, note
        return made

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["packed", "scale"], {"note": self.note, "device": self.device}

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Scaled:
        return cls(inner["packed"], inner["scale"], context["note"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # torch's way
        if func is torch.ops.aten.detach.default:
            return cls(args[0].packed.detach(), args[0].scale.detach(), args[0].note)
        if func is torch.ops.aten.copy_.default:
            args[0].packed.copy_(args[1].packed)
            args[0].scale.copy_(args[1].scale)
            return args[0]
        plain = tree_map(lambda x: x.packed * x.scale if isinstance(x, Scaled) else x, (args, kwargs or {}))
        return func(*plain[0], **plain[1])

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's docs have it


def scaled(seed: int, note: Any = "none", *, nested: bool = False, shape: tuple[int, ...] = (4, 3)) -> Scaled:
    torch.manual_seed(seed)
    scale = torch.rand(1)
    inner = torch.randint(-9, 9, shape, dtype=torch.int8)
    return Scaled(Scaled(inner, scale, "inner") if nested else inner, torch.rand(1), note)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Scaled):
        return type(b) is Scaled and equal(a.packed, b.packed) and equal(a.scale, b.scale) and a.note == b.note
    return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)


class Quantized(nn.Module):
    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(scaled(seed, **options), requires_grad=False)
        self.bias = nn.Parameter(torch.full((2,), float(seed)))


class Holder:
    """A Stateful for which the checkpoint decides."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state_dict: Any) -> None:
        self.state = state_dict


def test_inner_tensors_have_names_of_their_own() -> None:
    tensor = scaled(0, nested=True)
    flat = flatten({"w": tensor, "tied": tensor, "box": Holder([tensor.scale])})
    assert list(flat.tensors) == ["w#packed#packed", "w#packed#scale", "w#scale"]
    assert flat.aliases == {
        "tied#packed#packed": "w#packed#packed",
        "tied#packed#scale": "w#packed#scale",
        "tied#scale": "w#scale",
        "box.0": "w#scale",
    }
    assert set(flat.subclasses) == {"w", "tied"}
    assert flat.statefuls["box"].names == {"box.0"}
    node = flat.tree["dict"][1][0]
    assert node["type"].endswith("test_subclasses.Scaled")
    assert node["context"] == "{'device': device, 'note': 'none'}"
    assert [name for name, _ in node["subclass"]] == ["packed", "scale"]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_module_of_subclasses(into, nested, assign):
    model, other = Quantized(0, nested=nested), Quantized(1, nested=nested)
    kept = other.weight
    into({"model": other}, {"model": model}, assign=assign)
    assert equal(other.weight.detach(), model.weight.detach())
    assert torch.equal(other.bias, model.bias)
    assert (other.weight is kept) is not assign


@pytest.mark.parametrize("nested", [False, True])
def test_bare_ones_are_filled_where_they_are(into, nested):
    target = {"l": [scaled(1, nested=nested)], "t": (scaled(2),)}
    first, second = target["l"][0], target["t"][0]
    into(target, {"l": [scaled(3, nested=nested)], "t": (scaled(4),)})
    assert target["l"][0] is first
    assert target["t"][0] is second
    assert equal(first, scaled(3, nested=nested))
    assert equal(second, scaled(4))


def test_assign_makes_new_ones_of_the_targets_class(into):
    empty = Scaled(torch.empty(4, 3, dtype=torch.int8, device="meta"), torch.empty(1, device="meta"))
    target = {"w": empty, "x": scaled(1)}
    old = target["x"]
    into(target, {"w": scaled(5), "x": scaled(6)}, assign=True)
    assert equal(target["w"], scaled(5))
    assert equal(target["x"], scaled(6))
    assert target["x"] is not old
    assert equal(old, scaled(1))


def test_ties_of_subclasses_stay(into):
    first, second = scaled(0), scaled(1)
    target = {"a": second, "b": second}
    into(target, {"a": first, "b": first})
    assert target["a"] is target["b"]
    assert equal(second, first)


def test_a_checkpoint_that_decides_fills_what_is_there(into):
    target = Holder({"m": scaled(1), "other": 1})
    there = target.state["m"]
    into({"o": target}, {"o": Holder({"m": scaled(2), "new": torch.ones(2)})})
    assert target.state["m"] is there
    assert equal(there, scaled(2))
    assert sorted(target.state) == ["m", "new"]


def test_inner_tensors_of_other_shapes_are_made_anew_where_the_checkpoint_decides(into):
    target = Holder(Scaled(torch.ones(2, dtype=torch.int8), torch.ones(5)))
    stored = Scaled(torch.full((2,), 3, dtype=torch.int8), torch.full((1,), 2.0))
    into({"o": target}, {"o": Holder(stored)})
    assert equal(target.state, stored)


@pytest.mark.parametrize("state", [{}, {"m": torch.ones(4, 3)}, {"m": 1}, {"m": scaled(0, "other")}])
def test_none_is_made_where_the_state_has_none(into, state):
    with pytest.raises(UnsupportedValue, match=r"'o\.m' is a .*Scaled .*take a step first"):
        into({"o": Holder(state)}, {"o": Holder({"m": scaled(0)})})


def test_a_load_without_template_refuses_and_says_how(checkpointer):
    storage = MemoryStorage()
    checkpointer.save(storage, {"w": scaled(0), "x": torch.ones(1)})
    with pytest.raises(UnsupportedValue, match=r"'w' is a .*Scaled of shape \[4, 3\].*Load into a state"):
        checkpointer.load(storage)
    assert set(checkpointer.load(storage, keys=["x"])) == {"x"}


OTHER = Scaled(torch.ones(4, 3, dtype=torch.int8), torch.ones(2))
MISMATCHES: list[tuple[Any, Any, str, list[str]]] = [
    (scaled(0, "a"), scaled(0, "b"), r"'note': 'a'.* in the state, .*'note': 'b'.* in the checkpoint", ["w"]),
    (scaled(0, shape=(2, 2)), scaled(0), r"shape \[2, 2\].* in the state, .*shape \[4, 3\]", ["w"]),
    (scaled(0, nested=True), scaled(0), r"Scaled.* in the state, a plain tensor in the checkpoint", ["w"]),
    (torch.ones(4, 3), scaled(0), r"w: no subclass in the state, a .*Scaled", ["w"]),
    (5, scaled(0), r"w: no subclass in the state, a .*Scaled", ["w"]),
    (scaled(0), torch.ones(4, 3), r"w: a .*Scaled.* in the state, no subclass in the checkpoint", ["w"]),
    (scaled(0), 5, r"w: a .*Scaled.* in the state, no subclass in the checkpoint", ["w"]),
    (OTHER, scaled(0), r"w#scale: shape \[2\] in the state, \[1\]", ["w#scale"]),
]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("target", "stored", "said", "names"), MISMATCHES, ids=range(len(MISMATCHES)))
def test_what_differs_is_named_on_both_sides(into, target, stored, said, names, strict):
    with pytest.raises(StateMismatch, match=said) as caught:
        into({"w": target, "x": 1}, {"w": stored, "x": 2}, strict=strict)
    assert list(caught.value.mismatched) == names
    assert caught.value.missing == caught.value.unexpected == ()


def test_missing_and_unexpected(into):
    with pytest.raises(StateMismatch) as caught:
        into({"w": scaled(0)}, {"v": scaled(0)})
    assert caught.value.missing == ("w#packed", "w#scale")
    assert caught.value.unexpected == ("v#packed", "v#scale")
    target = {"w": scaled(1), "x": 1}
    into(target, {"v": scaled(0), "x": 2}, strict=False)
    assert equal(target["w"], scaled(1))
    assert target["x"] == 2


def test_keys_rename_and_wrappers_take_one_as_a_whole(checkpointer, into):
    target = {"m": {"w": scaled(1), "v": scaled(2)}}
    stored = {"m": {"w": scaled(3), "v": scaled(4)}}
    into(target, stored, keys=["m.w"])
    assert equal(target["m"]["w"], scaled(3))
    assert equal(target["m"]["v"], scaled(2))
    into(target, {"net": {"k": scaled(5), "v": scaled(6)}}, rename={"net.k": "m.w", "net": "m"})
    assert equal(target["m"]["w"], scaled(5))
    into(target, {"m": {"module": stored["m"]}})
    assert equal(target["m"]["w"], scaled(3))
    storage = MemoryStorage()
    assert checkpointer.save(storage, stored, keys=["*.v"]).tensors == 2
    part = {"m": {"v": scaled(1)}}
    checkpointer.load(storage, part)
    assert equal(part["m"]["v"], scaled(4))


class Mode(enum.Enum):
    FAST = 1


def test_contexts_are_told_apart_and_stable() -> None:
    class Plain:
        def __init__(self, x: Any) -> None:
            self.x = x

    texts = [None, 1, True, 1.0, "1", b"1", [1], [[1]], {1: 2}, {1}, Mode.FAST, torch.int8, torch.Size([2]), Plain(1)]
    found = [context_text(value) for value in [*texts, Plain(2), Plain, len]]
    assert len(set(found)) == len(found)
    assert context_text({"a": 1, "b": Plain([2])}) == context_text({"b": Plain([2]), "a": 1})
    assert context_text(torch.device("cpu")) == context_text(torch.device("cuda:1"))
    assert not any("0x" in text for text in found)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (scaled(0, torch.ones(1)), "puts a tensor into the context"),
        (Scaled(torch.eye(2).to_sparse(), torch.ones(1)), r"'w#packed' is a torch\.Tensor.*sparse"),
    ],
)
def test_what_cannot_be_stored_within_is_refused(tensor, said):
    with pytest.raises(UnsupportedValue, match=said):
        flatten({"w": tensor})


def test_names_within_may_not_be_taken() -> None:
    with pytest.raises(AsyncDCPError, match="inner tensor scale"):
        flatten({"w#scale": torch.ones(1), "w": scaled(0)})


NODE: dict[str, Any] = {"subclass": [["a", {"t": "w#a"}]], "name": "w", "type": "X", "context": "", "shape": [1]}
BROKEN: list[dict[str, Any]] = [
    {**NODE, "name": "v"},
    {**NODE, "shape": ["1"]},
    {**NODE, "context": 1},
    {**NODE, "subclass": [["a", {"t": "elsewhere"}]]},
    {**NODE, "subclass": [["a", {"v": "w#a"}]]},
    {**NODE, "subclass": [["a", {"list": []}]]},
    {**NODE, "subclass": [["a"]]},
    {**NODE, "subclass": None},
    {"subclass": []},
]


@pytest.mark.parametrize("node", BROKEN, ids=range(len(BROKEN)))
def test_nodes_are_not_trusted(node):
    TreeNodes({"dict": [["w"], [NODE]]}, str)
    with pytest.raises(CorruptCheckpoint, match="the tree"):
        TreeNodes({"dict": [["w"], [node]]}, str)


def test_torchao() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import (  # type: ignore[import-not-found]  # where it is installed
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    for config in (Int8WeightOnlyConfig, Float8WeightOnlyConfig):
        first, second = (nn.Sequential(nn.Linear(64, 64)) for _ in range(2))
        for model in (first, second):
            quantize_(model, config())
        storage = MemoryStorage()
        with SyncCheckpointer(process=False) as checkpointer:
            checkpointer.save(storage, {"model": first})
            checkpointer.load(storage, {"model": second})
        inputs = torch.randn(3, 64)
        assert torch.equal(first(inputs), second(inputs))
