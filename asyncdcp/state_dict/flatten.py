"""A nested state taken apart: a tree of its containers, and tables of tensors, values and Statefuls by FQN."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import msgspec
from torch import Tensor
from torch.nn.parameter import is_lazy

from asyncdcp.errors import DuplicateName, InvalidOption, UnsupportedValue
from asyncdcp.state_dict.arrays import is_numpy
from asyncdcp.state_dict.chunks import is_checkpointable
from asyncdcp.state_dict.keys import encode_key
from asyncdcp.state_dict.leaves import Refusal
from asyncdcp.state_dict.subclasses import Subclass, describe_kind, is_subclass, take_apart
from asyncdcp.state_dict.tensors import AliasGroups, tensor_kinds
from asyncdcp.state_dict.values import MAX_DEPTH, PLAIN_KINDS, encode_value, factory_name, unsupported
from asyncdcp.stateful import PerRank, RNGState, Stateful, is_stateful


class Taken(NamedTuple):
    """A Stateful, what its ``state_dict()`` gave, the FQNs of all leaves in that, and whether it stands in the state of
    another.
    """

    stateful: Stateful
    state: Any
    names: frozenset[str]
    inner: bool


@dataclass(frozen=True)
class FlatState:
    """A state by fully qualified names (FQNs), in the order in which it was walked.

    An FQN joins the steps of a path with ".": ``str(key)`` in dicts, the index in lists and tuples. A Stateful adds no
    step of its own, and what stands at the empty name adds no dot. A state that is a single leaf has the FQN "". The
    inner tensors of a tensor subclass have its FQN, "#" and their names in it.
    """

    tree: Any
    """The containers, JSON-able; equal under ``==`` exactly when they are equal. A node is an object with one tag:

    ``{"t": fqn}`` a tensor, ``{"v": fqn}`` a plain value; ``{"list": [node, …]}``, ``{"tuple": [node, …]}``;
    ``{"dict": [[key, …], [node, …]]}``; ``{"ordered": [[key, …], [node, …]]}`` an OrderedDict, with a second field
    ``"metadata"`` where it has the attribute ``_metadata``: the encoded value as JSON text; ``{"defaultdict":
    [[key, …], [node, …]], "factory": name}``; ``{"stateful": node}`` and ``{"per_rank": node}`` around what a Stateful
    or PerRank holds, both around an RNGState's. A tensor subclass is ``{"subclass": [[name, node], …], "name": fqn,
    "type": qualified name, "context": text, "shape": sizes}``, the nodes being tensors and subclasses.
    """
    tensors: dict[str, Tensor]
    """Each distinct tensor once, under its first FQN."""
    aliases: dict[str, str]
    """The other FQNs of tied tensors, with the FQN under which the tensor is in ``tensors``."""
    values: dict[str, Any]
    """Plain values, encoded by ``encode_value``."""
    statefuls: dict[str, Taken]
    """The Statefuls whose ``state_dict()`` was taken, by the FQN at which they stand, in the state's order."""
    subclasses: dict[str, Subclass] = field(default_factory=dict)
    """The tensor subclasses by FQN, without those inside others; their inner tensors are in ``tensors``."""


def flatten(state: Any, *, allow_pickle: bool = False, allow_meta: bool = False) -> FlatState:
    """Take ``state`` apart. Nothing of it is changed, tensors are not copied, plain values are encoded (so copied).

    Lists and tuples in which there are only plain values (and such lists and tuples) are one plain value, so that a
    loss history may grow without a change of structure.

    Each Stateful's ``state_dict()`` is called once, in order. Raises ``UnsupportedValue`` for the first thing that
    cannot be stored, by FQN and type, and for what is nested too deep or holds itself; ``DuplicateName`` where two
    entries have one FQN. With ``allow_pickle`` what would be refused is pickled instead, tensors too; keys never are.
    ``allow_meta`` is for the targets of a load that replaces tensors: those on the meta device are accepted.
    ``InvalidOption`` where there is no state at all.
    """
    if state is None:
        raise InvalidOption("the state is None: give one, such as {'model': model}; what made this may lack its return")
    walk = _Flattener(allow_pickle=allow_pickle, allow_meta=allow_meta)
    tree = walk.visit(state, "", _Frame("state", None, ""), _ROOT, 0)
    return FlatState(tree, walk.groups.tensors, walk.groups.aliases, walk.values, walk.statefuls, walk.subclasses)


class _Frame(NamedTuple):
    """A container under way: its path as Python writes it, the container, and what its entries' FQNs begin with."""

    path: str
    value: Any
    prefix: str

    def show(self, key: Any) -> str:
        return self.path if key is _ROOT else f"{self.path}[{key!r}]"

    def show_fqn(self, fqn: str) -> str:
        """The path of the first entry that has ``fqn``."""
        keys = (
            self.value
            if type(self.value) in _DICTS
            else range(len(self.value))
            if type(self.value) in _SEQUENCES
            else ()
        )
        return next((self.show(key) for key in keys if self.prefix + str(key) == fqn), self.path)


_SEQUENCES: dict[type, str] = {list: "list", tuple: "tuple"}
_DICTS: dict[type, str] = {dict: "dict", OrderedDict: "ordered", defaultdict: "defaultdict"}
_ROOT = object()


class _Flattener:
    """One walk. It makes no more objects for a leaf than the tree has, none of which the garbage collector tracks, so
    that a walk over many tensors is quick and sets off no full collection."""

    def __init__(self, *, allow_pickle: bool, allow_meta: bool) -> None:
        self.groups = AliasGroups(allow_meta=allow_meta)
        self.values: dict[str, Any] = {}
        self.statefuls: dict[str, Taken] = {}
        self.subclasses: dict[str, Subclass] = {}
        self._allow_pickle = allow_pickle
        self._tensor_kinds = tensor_kinds()
        self._leaves: dict[str, _Frame] = {}
        self._stateful_frames: dict[str, _Frame] = {}
        self._composed: set[str] = set()  # names in _leaves that are not leaves: subclasses, inner ones too
        self._open: set[int] = set()
        self._within = False  # a Stateful's state

    def visit(self, value: Any, fqn: str, frame: _Frame, key: Any, depth: int) -> dict[str, Any]:
        """The node of ``value``, which stands at ``key`` in the container of ``frame``."""
        kind = type(value)
        if kind in self._tensor_kinds or (isinstance(value, Tensor) and is_checkpointable(value)):
            if fqn in self._leaves:
                raise _duplicate(fqn, self._leaves[fqn], frame, key)
            self._leaves[fqn] = frame
            return self._tensor(value, fqn)
        if _is_container(kind, value):
            return self._container(value, fqn, frame, key, depth)
        if fqn in self._leaves:
            raise _duplicate(fqn, self._leaves[fqn], frame, key)
        self._leaves[fqn] = frame
        if isinstance(value, Tensor):
            if self._is_composed(value):
                node = self._subclass(value, fqn, frame.show(key), depth)
                self.subclasses[fqn] = Subclass(value, node)
                return node
            if not self._allow_pickle:
                raise unsupported(fqn, value, _subclass_reason(value))
        return self._value(value, fqn)

    def _is_composed(self, value: Tensor) -> bool:
        """Whether all of a subclass is tensors that can be stored; if not, it may still be pickled as a whole."""
        if not is_subclass(value):
            return False
        if not self._allow_pickle:
            return True  # what cannot be stored is refused by its own name
        try:
            inner = take_apart(value)[0].values()
        except Refusal:
            return False
        return all(type(part) in self._tensor_kinds or self._is_composed(part) for part in inner)

    def _subclass(self, value: Tensor, fqn: str, path: str, depth: int) -> dict[str, Any]:
        if depth >= MAX_DEPTH:
            raise UnsupportedValue(f"{path:.200}… is nested deeper than {MAX_DEPTH} levels", tensors=[fqn])
        self._composed.add(fqn)
        try:
            inner, context = take_apart(value)
        except Refusal as refusal:
            raise unsupported(fqn, value, str(refusal)) from None
        nodes = [[name, self._inner(part, f"{fqn}#{name}", path, depth + 1)] for name, part in inner.items()]
        shape = list(value.shape)
        return {"subclass": nodes, "name": fqn, "type": describe_kind(value), "context": context, "shape": shape}

    def _inner(self, value: Tensor, fqn: str, path: str, depth: int) -> dict[str, Any]:
        """The node of a subclass's inner tensor; it is never pickled by itself."""
        frame = _Frame(f"{path}, inner tensor {fqn.rpartition('#')[2]}", None, "")
        if fqn in self._leaves:
            raise _duplicate(fqn, self._leaves[fqn], frame, _ROOT)
        self._leaves[fqn] = frame
        if type(value) not in self._tensor_kinds:
            if is_subclass(value):
                return self._subclass(value, fqn, frame.path, depth)
            raise unsupported(fqn, value, _subclass_reason(value))
        try:
            self.groups.add(fqn, value)
        except Refusal as refusal:
            raise unsupported(fqn, value, str(refusal)) from None
        return {"t": fqn}

    def _tensor(self, tensor: Tensor, fqn: str) -> dict[str, Any]:
        try:
            self.groups.add(fqn, tensor)
        except Refusal as refusal:
            if self._allow_pickle:
                return self._value(tensor, fqn)
            raise unsupported(fqn, tensor, str(refusal)) from None
        return {"t": fqn}

    def _value(self, value: Any, fqn: str) -> dict[str, Any]:
        self.values[fqn] = encode_value(value, fqn, allow_pickle=self._allow_pickle)
        return {"v": fqn}

    def _container(self, value: Any, fqn: str, outer: _Frame, key: Any, depth: int) -> dict[str, Any]:
        path = outer.show(key)
        if id(value) in self._open:
            raise UnsupportedValue(f"{path} is a container that holds itself", tensors=[fqn])
        if depth >= MAX_DEPTH:
            raise UnsupportedValue(f"{path:.200}… is nested deeper than {MAX_DEPTH} levels", tensors=[fqn])
        self._open.add(id(value))
        kind = type(value)
        frame = _Frame(path, value, f"{fqn}." if fqn else "")
        if kind in _DICTS:
            node = self._dict(value, fqn, frame, depth + 1)
        elif kind in _SEQUENCES:
            node = {_SEQUENCES[kind]: self._items(value, frame, depth + 1)}
        elif isinstance(value, PerRank):
            node = {"per_rank": self.visit(value.value, fqn, _Frame(f"{path}.value", None, ""), _ROOT, depth + 1)}
        else:
            if fqn in self._stateful_frames:
                raise _duplicate(fqn, self._stateful_frames[fqn], outer, key)
            self._stateful_frames[fqn] = outer
            node = self._stateful(value, fqn, path, depth + 1)
        self._open.discard(id(value))
        return node

    def _dict(self, mapping: dict[Any, Any], fqn: str, frame: _Frame, depth: int) -> dict[str, Any]:
        prefix, visit = frame.prefix, self.visit
        keys = [encode_key(key, frame.path) for key in mapping]
        nodes = [visit(value, f"{prefix}{key}", frame, key, depth) for key, value in mapping.items()]
        node: dict[str, Any] = {_DICTS[type(mapping)]: [keys, nodes]}
        if isinstance(mapping, OrderedDict) and vars(mapping):
            node["metadata"] = self._metadata(mapping, fqn)
        elif isinstance(mapping, defaultdict):
            try:
                node["factory"] = factory_name(mapping)
            except Refusal as refusal:
                raise unsupported(fqn, mapping, str(refusal)) from None
        return node

    def _metadata(self, mapping: OrderedDict[Any, Any], fqn: str) -> str:
        """The ``_metadata`` that ``nn.Module.state_dict()`` sets, as JSON text; no other attribute would come back."""
        others = [name for name in vars(mapping) if name != "_metadata"]
        if others:
            raise unsupported(fqn, mapping, f"it has attributes: {', '.join(others)[:80]}")
        metadata = encode_value(vars(mapping)["_metadata"], f"{fqn}._metadata", allow_pickle=self._allow_pickle)
        return msgspec.json.encode(metadata).decode()

    def _items(self, items: Iterable[Any], frame: _Frame, depth: int) -> list[Any]:
        return [self.visit(item, f"{frame.prefix}{i}", frame, i, depth) for i, item in enumerate(items)]

    def _stateful(self, value: Stateful, fqn: str, path: str, depth: int) -> dict[str, Any]:
        inner = _Frame(f"{path}.state_dict()", None, "")
        before, state, within = len(self._leaves), _state_of(value, fqn), self._within
        # Its place in the order comes before those inside it.
        self.statefuls[fqn] = Taken(value, state, frozenset(), within)
        self._within = True
        node = {"stateful": self.visit(state, fqn, inner, _ROOT, depth)}
        self._within = within
        names = frozenset(islice(self._leaves, before, None)) - self._composed
        self.statefuls[fqn] = Taken(value, state, names, within)
        return {"per_rank": node} if isinstance(value, RNGState) else node


def _state_of(stateful: Stateful, fqn: str) -> Any:
    """What it raises is raised as it is, and told with its name."""
    try:
        return stateful.state_dict()
    except Exception as error:
        error.add_note(f"raised by the state_dict of {fqn or 'the state'}")
        raise


def _is_container(kind: type, value: Any) -> bool:
    """Whether ``value`` has entries of its own; else it is one value, storable or not."""
    if kind in PLAIN_KINDS:
        return False
    if kind in _SEQUENCES:
        return not is_plain_sequence(value)
    if kind in _DICTS or isinstance(value, PerRank):
        return True
    return not isinstance(value, Tensor) and is_stateful(value)


def _subclass_reason(value: Tensor) -> str:
    if value.is_nested:
        return "it is nested (jagged); store values() and offsets(), or unbind() it"
    if is_lazy(value):
        return "it is a lazy module's and has no shape yet; run the module on one batch first"
    return "it is a tensor subclass without __tensor_flatten__ and __tensor_unflatten__"


def _duplicate(fqn: str, first: _Frame, second: _Frame, key: Any) -> DuplicateName:
    message = (
        f"{first.show_fqn(fqn)} and {second.show(key)} have the same fully qualified name {fqn!r}; rename one of them"
    )
    return DuplicateName(message, tensors=[fqn])


def is_plain_sequence(value: Any, depth: int = 0) -> bool:
    """Whether ``value`` is a list or tuple that holds plain values, and such lists and tuples, only.

    False for what is nested deeper than any value may be, such as a list that holds itself.
    """
    if type(value) not in _SEQUENCES or depth > MAX_DEPTH:
        return False
    kinds = set(map(type, value))
    if not all(kind in PLAIN_KINDS or kind in _SEQUENCES or is_numpy(kind) for kind in kinds):
        return False
    if kinds.isdisjoint(_SEQUENCES):
        return True
    return all(is_plain_sequence(item, depth + 1) for item in value if type(item) in _SEQUENCES)
