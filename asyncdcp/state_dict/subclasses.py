"""Tensor subclasses with ``__tensor_flatten__`` (torchao, float8): stored as their inner tensors, known by class and
context.

A subclass is never made from what a checkpoint says: its class would have to be imported, and its context run. What is
stored of both is text, which must be equal to that of the target's, so the target decides.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asyncdcp.errors import CorruptCheckpoint, UnsupportedValue
from asyncdcp.state_dict.leaves import Refusal

FIELDS = ("name", "type", "context", "shape")
"""What a node has besides its tag ``subclass``."""

_SHOWN = 300
_DEPTH = 20
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.layout, torch.memory_format)


class Subclass(NamedTuple):
    """A subclass that stands in a state, and its node in the state's tree."""

    tensor: Tensor
    node: dict[str, Any]


def is_subclass(value: Tensor) -> bool:
    """Whether ``value`` says itself of which tensors it consists, all the way down to plain ones.

    Jagged tensors say so too, but their shapes mean something in one process only.
    """
    kind = type(value)
    return hasattr(kind, "__tensor_flatten__") and hasattr(kind, "__tensor_unflatten__") and not value.is_nested


def take_apart(value: Tensor) -> tuple[dict[str, Tensor], str]:
    """The inner tensors by name, and the context as text. Raises ``Refusal`` for a context whose content would be
    lost.
    """
    names, context = value.__tensor_flatten__()  # type: ignore[attr-defined]  # see is_subclass
    inner = {name: getattr(value, name) for name in names}
    for name, tensor in inner.items():
        if not isinstance(tensor, Tensor):
            raise Refusal(f"its __tensor_flatten__ names {name}, which is a {type(tensor).__name__}")
    return inner, context_text(context)


def describe_kind(value: Tensor) -> str:
    """The qualified name of a tensor's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def put_together(target: Tensor, node: dict[str, Any], new: Callable[[str], Tensor]) -> Tensor:
    """A subclass like ``target``, whose node is ``node``, of other inner tensors: ``new`` gives them by FQN."""
    inner = {
        name: new(part["t"]) if "t" in part else put_together(getattr(target, name), part, new)
        for name, part in node["subclass"]
    }
    _, context = target.__tensor_flatten__()  # type: ignore[attr-defined]  # see is_subclass
    made: Tensor = type(target).__tensor_unflatten__(  # type: ignore[attr-defined]  # likewise
        inner, context, target.size(), target.stride()
    )
    return made


# ── nodes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_node(node: dict[str, Any]) -> None:
    """``CorruptCheckpoint`` unless a node of unknown origin is that of a subclass, down to its inner tensors."""
    _check(node, None, 0)


def _check(node: Any, name: str | None, depth: int) -> None:
    if type(node) is dict and len(node) == 1 and type(node.get("t")) is str and name is not None:
        fqn = node["t"]
    elif type(node) is dict and list(node) == ["subclass", *FIELDS] and depth <= _DEPTH:
        fqn = node["name"]
        texts = all(type(node[field]) is str for field in ("name", "type", "context"))
        shape, inner = node["shape"], node["subclass"]
        if not texts or type(shape) is not list or any(type(size) is not int for size in shape):
            raise CorruptCheckpoint("the tree has a tensor subclass of malformed fields")
        if type(inner) is not list or any(type(p) is not list or len(p) != 2 or type(p[0]) is not str for p in inner):
            raise CorruptCheckpoint("the tree has a tensor subclass that is not its inner names and nodes")
        for part, content in inner:
            _check(content, f"{fqn}#{part}", depth + 1)
    else:
        raise CorruptCheckpoint("the tree has a tensor subclass whose inner nodes are no tensors")
    if name is not None and fqn != name:
        raise CorruptCheckpoint(f"the tree has the inner tensor {fqn!r:.200} where {name!r:.200} belongs")


def inner_names(node: dict[str, Any]) -> Iterator[str]:
    """The FQNs of a subclass's plain inner tensors."""
    for _, part in node["subclass"]:
        if "t" in part:
            yield part["t"]
        else:
            yield from inner_names(part)


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """What tells two subclasses apart, but for their inner tensors' shapes and dtypes; None if nothing does."""
    if "subclass" not in ours or "subclass" not in theirs:
        return None if ours.keys() == theirs.keys() else f"{show(ours)} in the state, {show(theirs)} in the checkpoint"
    own, stored = dict(ours["subclass"]), dict(theirs["subclass"])
    if any(ours[field] != theirs[field] for field in ("type", "context", "shape")):
        return f"{show(ours)} in the state, {show(theirs)} in the checkpoint"
    if list(own) != list(stored):
        return f"{show(ours)} of {', '.join(own)} in the state, of {', '.join(stored)} in the checkpoint"
    return next((found for name in own if (found := difference(own[name], stored[name])) is not None), None)


def show(node: dict[str, Any]) -> str:
    """A node as messages call it."""
    if "subclass" not in node:
        return "a plain tensor"
    return f"a {node['type']} of shape {node['shape']}, context {_cut(node['context'])}"


def cannot_be_made(node: dict[str, Any]) -> UnsupportedValue:
    """The refusal to make a subclass where the state has none."""
    name = node["name"]
    return UnsupportedValue(
        f"{name!r} is {show(node)} in the checkpoint, and a load does not make one: that would run code of the "
        "checkpoint's choosing. Load into a state that has it there (for an optimizer's state: take a step first), or "
        "leave it out with keys=",
        tensors=[name],
    )


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


# ── contexts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def context_text(value: Any, depth: int = 0) -> str:
    """A text of a flatten context that is the same in every process, and different where the context is.

    Devices are left out: where a tensor is does not change what it is. Objects without a ``repr`` of their own are
    shown by their attributes. Raises ``Refusal`` for tensors, whose content would be lost.
    """
    if isinstance(value, Tensor):
        raise Refusal("its __tensor_flatten__ puts a tensor into the context, where it cannot be stored")
    if depth > _DEPTH:
        raise Refusal(f"its flatten context is nested deeper than {_DEPTH} levels")
    if isinstance(value, torch.device):
        return "device"
    sub = functools.partial(context_text, depth=depth + 1)
    if isinstance(value, enum.Enum):
        return f"{_name(type(value))}.{value.name}"
    if type(value) in _ATOMS:
        return repr(value)
    if isinstance(value, dict):
        return "{" + ", ".join(sorted(f"{sub(key)}: {sub(item)}" for key, item in value.items())) + "}"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(sub, value))) + "}"
    if isinstance(value, (list, tuple)):  # their subclasses, such as torch.Size, by what is in them
        return "[" + ", ".join(map(sub, value)) + "]"
    return _object_text(value, sub)


def _object_text(value: Any, sub: Callable[[Any], str]) -> str:
    kind: Any = type(value)
    if isinstance(value, functools.partial):
        return f"partial({sub(value.func)}, {sub(value.args)}, {sub(value.keywords)})"
    if hasattr(value, "__qualname__"):  # classes and functions
        return _name(value)
    if dataclasses.is_dataclass(value):
        content = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif kind.__repr__ is object.__repr__ and hasattr(value, "__dict__"):
        content = vars(value)
    else:
        return _ADDRESS.sub("", f"{_name(kind)}({value!r})")
    return f"{_name(kind)}({', '.join(f'{name}={sub(item)}' for name, item in sorted(content.items()))})"


def _name(named: Any) -> str:
    return f"{getattr(named, '__module__', '')}.{named.__qualname__}"
