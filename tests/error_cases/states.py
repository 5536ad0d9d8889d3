"""States that cannot be saved, and states that a checkpoint does not fit."""

from __future__ import annotations

import functools
import threading
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from asyncdcp import RNGState
from tests.error_cases.cases import case, load, save

# ── states that cannot be saved ─────────────────────────────────────────────────────────────────────────────────────


class Opaque(Tensor):
    """A wrapper that does not say what it consists of."""

    @staticmethod
    def __new__(cls) -> Opaque:
        made: Opaque = Tensor._make_wrapper_subclass(cls, (2,))
        return made

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise NotImplementedError


class Contextual(TwoTensor):
    """Puts a tensor where only its description belongs."""

    def __tensor_flatten__(self) -> Any:
        return ["a"], torch.ones(1)


def _freed() -> Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


def _quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


def _nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(1)])


def _attributed() -> Any:
    ordered: Any = OrderedDict(a=torch.ones(1))
    ordered.note = "lost"
    return ordered


def _cycle() -> Any:
    state: dict[str, Any] = {}
    state["self"] = state
    return state


def _deep() -> Any:
    state: Any = torch.ones(1)
    for _ in range(101):
        state = [state]
    return state


_UNSUPPORTED: list[tuple[str, Callable[[], Any]]] = [
    ("an object of a class of your own", object),
    ("a class or a function", lambda: nn.ReLU),
    ("a sparse tensor", lambda: torch.eye(2).to_sparse()),
    ("a quantized tensor", _quantized),
    ("a nested tensor", _nested),
    ("a tensor on the meta device", lambda: torch.ones(2, device="meta")),
    ("a tensor whose memory was freed (FSDP)", _freed),
    ("a tensor under a functional transform", lambda: torch._to_functional_tensor(torch.ones(2))),
    ("a parameter of a lazy module", nn.UninitializedParameter),
    ("a tensor subclass that cannot be flattened", Opaque),
    ("a subclass with a tensor in its context", lambda: Contextual(torch.ones(2), torch.ones(2))),
    ("a tensor in a set or deque", lambda: {torch.ones(1)}),
    ("a defaultdict with a factory of your own", lambda: defaultdict(threading.Event)),
    ("an OrderedDict with attributes", _attributed),
    ("a key of another type", lambda: {b"key": 1}),
    ("a container that holds itself", _cycle),
    ("more than 100 levels", _deep),
]
for _cause, _make in _UNSUPPORTED:
    case("save", _cause)(functools.partial(lambda make: save({"x": make()}), _make))


@case("save", "two entries of one name")
def _duplicate() -> None:
    save({"a": {"b": 1}, "a.b": 2})


@case("save", "metadata= that is not JSON")
def _metadata() -> None:
    save({"x": 1}, metadata={"when": object()})


@case("save", "metadata= of more than 32 MiB")
def _large_metadata() -> None:
    save({"x": 1}, metadata={"log": "x" * (33 << 20)})


@case("save", "no state, but None")
def _no_state() -> None:
    save(None)


@case("save", "keys= that match nothing")
def _save_keys() -> None:
    save({"model": 1}, keys=["net.*"])


# ── mismatches ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _meta_model() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(2, 2)


_MISMATCHES: list[tuple[str, Callable[[], tuple[Any, Any]]]] = [
    ("the state has more", lambda: ({"x": 1, "weight": torch.ones(1)}, {"x": 1})),
    ("the checkpoint has more", lambda: ({"x": 1}, {"x": 1, "weight": torch.ones(1)})),
    ("a name is spelled otherwise", lambda: ({"weight": torch.ones(1)}, {"weights": torch.ones(1)})),
    ("another shape", lambda: ({"x": torch.ones(2)}, {"x": torch.ones(3)})),
    ("another dtype", lambda: ({"x": torch.ones(2)}, {"x": torch.ones(2).half()})),
    ("a tensor, and a value in the checkpoint", lambda: ({"x": torch.ones(1)}, {"x": 1})),
    ("a value, and a tensor in the checkpoint", lambda: ({"x": 1}, {"x": torch.ones(1)})),
    ("a target on the meta device", lambda: ({"m": _meta_model()}, {"m": nn.Linear(2, 2)})),
    ("a target that was expanded", lambda: ({"x": torch.ones(1).expand(3)}, {"x": torch.ones(3)})),
    ("another tensor subclass", lambda: ({"x": torch.ones(2)}, {"x": TwoTensor(torch.ones(2), torch.ones(2))})),
    ("a module that refuses its state", lambda: ({"m": Strange()}, {"m": Strange()})),
    ("a Stateful that cannot take its state", lambda: ({"loader": Forgetful()}, {"loader": Forgetful()})),
]


class Strange(nn.Linear):
    def __init__(self) -> None:
        super().__init__(1, 1)

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("not today")


class Forgetful:
    def state_dict(self) -> dict[str, Any]:
        return {"position": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise KeyError("epoch")


for _cause, _pair in _MISMATCHES:
    case("mismatch", _cause)(functools.partial(lambda pair: load(save(pair()[1]), pair()[0]), _pair))


@case("mismatch", "a subclass that the state does not have")
def _no_subclass() -> None:
    load(save({"x": TwoTensor(torch.ones(2), torch.ones(2))}))


@case("mismatch", "load(keys=) that match nothing")
def _load_keys() -> None:
    load(save({"model": 1}), {"model": 2}, keys=["net.*"])


@case("mismatch", "load(rename=) that gives one name to two")
def _clashing_rename() -> None:
    both = {"a": torch.ones(1), "b": torch.ones(1)}
    load(save(both), {"a": torch.ones(1)}, rename={"b": "a"})


@case("mismatch", "a pickle, and no allow_pickle")
def _pickle() -> None:
    load(save({"f": nn.ReLU}, allow_pickle=True))


@case("mismatch", "an RNGState without its generators")
def _rng() -> None:
    RNGState().load_state_dict({"torch": torch.get_rng_state()})
