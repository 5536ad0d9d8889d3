"""States put together again from a tree and its tables: anew, or into a state that is there."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from torch import Tensor

from asyncdcp.errors import CorruptCheckpoint, StateMismatch
from asyncdcp.state_dict.flatten import is_plain_sequence
from asyncdcp.state_dict.keys import decode_key
from asyncdcp.state_dict.values import FACTORIES, MAX_DEPTH, decode_value
from asyncdcp.stateful import PerRank, Stateful

_KEYED = ("dict", "ordered", "defaultdict")
_LISTED = ("list", "tuple")
_DICT_KINDS = (dict, OrderedDict, defaultdict)
_WRAPPERS = ("stateful", "per_rank")
_SECOND_FIELD = {"ordered": "metadata", "defaultdict": "factory"}


class Loaded(NamedTuple):
    """What an in-place load leaves to its caller.

    ``state`` is the target, or what stands for it where it could not be changed in place (a tuple, a single value).
    ``statefuls`` are the target's Statefuls in its order, each with its FQN and its part of the checkpoint, which is to
    be given to its ``load_state_dict``.
    """

    state: Any
    statefuls: list[tuple[str, Stateful, Any]]


def unflatten(
    tree: Any, tensors: Mapping[str, Tensor], values: Mapping[str, Any], *, allow_pickle: bool = False
) -> Any:
    """A new state. ``tensors`` has the aliases' names too; tied names that map to one tensor come back as one.

    Statefuls and PerRanks come back as the plain state that they held. The tree is not trusted: ``CorruptCheckpoint``
    for a node that ``flatten`` does not make, and for a name that is not in the tables or is used twice.
    """
    return _Builder(tensors, values, allow_pickle=allow_pickle).build(tree, 0)


def unflatten_into(
    target: Any,
    tree: Any,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    *,
    strict: bool = True,
    allow_pickle: bool = False,
) -> Loaded:
    """Bring ``target`` to the checkpoint's state; its tensors have been filled before and are left as they are.

    Containers are kept and changed in place; a tuple is made anew only where something in it was. Plain values are
    replaced, those in a PerRank too. A Stateful is not touched, see ``Loaded``; its part is built by ``unflatten``.
    With ``strict`` ``StateMismatch`` for the first entry that only one side has, else those are left alone; always for
    an entry that is of another kind on each side. The target may then be partly changed.
    """
    merge = _Merger(_Builder(tensors, values, allow_pickle=allow_pickle), strict=strict)
    return Loaded(merge.merge(target, tree, "", 0), merge.statefuls)


class _Builder:
    """Checks nodes and builds what they describe. Each name may be used once, or little text would make much state."""

    def __init__(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], *, allow_pickle: bool) -> None:
        self._tensors = tensors
        self._values = values
        self._allow_pickle = allow_pickle
        self._used: set[str] = set()

    def open(self, node: Any, depth: int) -> tuple[str, Any]:
        """Tag and content of a node, whose fields are known to be the tag's; raises ``CorruptCheckpoint``."""
        if depth > MAX_DEPTH + 1:  # an RNGState's marks are two nodes for one level of the state
            raise CorruptCheckpoint(f"the tree is nested deeper than {MAX_DEPTH} levels")
        if type(node) is not dict or not node:
            raise CorruptCheckpoint("the tree has a node that is no object with a tag")
        tag, *rest = node
        if len(rest) > 1 or (rest and _SECOND_FIELD.get(tag) != rest[0]):
            raise CorruptCheckpoint(f"the tree has a node of unknown fields: {tag!s:.40}, {rest[0]!s:.40}")
        content = node[tag]
        if tag in ("t", "v"):
            _expect(str, content, tag)
        elif tag in _LISTED:
            _expect(list, content, tag)
        elif tag not in _KEYED and tag not in _WRAPPERS:
            raise CorruptCheckpoint(f"the tree has a node of the unknown kind {tag!s:.40}")
        return tag, content

    def build(self, node: Any, depth: int) -> Any:
        tag, content = self.open(node, depth)
        if tag == "t":
            return self.tensor(content)
        if tag == "v":
            return self.value(content)
        if tag in _LISTED:
            items = [self.build(item, depth + 1) for item in content]
            return items if tag == "list" else tuple(items)
        if tag in _KEYED:
            result = self._empty(tag, node)
            for key, item in self.entries(content).items():
                result[key] = self.build(item, depth + 1)
            return result
        return self.build(content, depth + 1)

    def tensor(self, fqn: str) -> Tensor:
        self._use(fqn)
        if fqn not in self._tensors:
            raise CorruptCheckpoint(f"the tree names the tensor {fqn!r:.200}, which is not there")
        return self._tensors[fqn]

    def value(self, fqn: str) -> Any:
        self._use(fqn)
        if fqn not in self._values:
            raise CorruptCheckpoint(f"the tree names the value {fqn!r:.200}, which is not there")
        return decode_value(self._values[fqn], fqn, allow_pickle=self._allow_pickle)

    def _use(self, fqn: str) -> None:
        if fqn in self._used:
            raise CorruptCheckpoint(f"the tree names {fqn!r:.200} twice")
        self._used.add(fqn)

    def entries(self, content: Any) -> dict[Any, Any]:
        """The nodes of a dict by their keys, in order."""
        columns = _expect(list, content, "dict")
        if len(columns) != 2:
            raise CorruptCheckpoint("the tree has a dict that is not its keys and nodes")
        keys, nodes = (_expect(list, column, "dict") for column in columns)
        result = dict(zip(map(decode_key, keys), nodes, strict=False))
        if not len(result) == len(keys) == len(nodes):
            raise CorruptCheckpoint("the tree has a dict with a key twice, or not a node for each key")
        return result

    def metadata(self, node: dict[str, Any]) -> Any:
        """The ``_metadata`` of an ordered node; call only where it has one."""
        text = _expect(str, node["metadata"], "metadata")
        try:
            encoded = msgspec.json.decode(text)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise CorruptCheckpoint(f"the tree has malformed metadata: {error!s:.200}") from error
        return decode_value(encoded, "_metadata", allow_pickle=self._allow_pickle)

    def _empty(self, tag: str, node: dict[str, Any]) -> dict[Any, Any]:
        if tag == "ordered":
            ordered: OrderedDict[Any, Any] = OrderedDict()
            if "metadata" in node:
                vars(ordered)["_metadata"] = self.metadata(node)
            return ordered
        if tag == "defaultdict":
            name = _expect(str, node.get("factory"), "factory")
            if name not in FACTORIES:
                raise CorruptCheckpoint(f"the tree has a defaultdict of the unknown factory {name:.40}")
            return defaultdict(FACTORIES[name])
        return {}


def _expect(kind: type, obj: Any, what: str) -> Any:
    if type(obj) is not kind:
        raise CorruptCheckpoint(f"the tree is malformed: {what}: {kind.__name__} expected, {type(obj).__name__} found")
    return obj


class _Merger:
    """One in-place load: the target is walked, and the tree beside it."""

    def __init__(self, builder: _Builder, *, strict: bool) -> None:
        self.statefuls: list[tuple[str, Stateful, Any]] = []
        self._builder = builder
        self._strict = strict

    def merge(self, target: Any, node: Any, fqn: str, depth: int) -> Any:
        """What is to stand at ``fqn``: ``target`` itself wherever it could be kept."""
        tag, content = self._builder.open(node, depth)
        if isinstance(target, PerRank):
            inner = content if tag == "per_rank" else node
            target.value = self.merge(target.value, inner, fqn, depth + 1)
            return target
        if not isinstance(target, (type, Tensor)) and isinstance(target, Stateful):
            # Outer marks fall away in building, so a state saved as a dict can be loaded into its object.
            self.statefuls.append((fqn, target, self._builder.build(node, depth)))
            return target
        if tag in _WRAPPERS:
            return self.merge(target, content, fqn, depth + 1)
        if tag == "t":
            if not isinstance(target, Tensor):
                raise _mismatch(fqn, "a tensor", target)
            return target
        if tag == "v":
            return self._value(target, content, fqn)
        if tag in _KEYED:
            if type(target) not in _DICT_KINDS:
                raise _mismatch(fqn, "a dict", target)
            return self._dict(target, node, tag, fqn, depth)
        if type(target) is not list and type(target) is not tuple:
            raise _mismatch(fqn, f"a {tag}", target)
        return self._sequence(target, content, fqn, depth)

    def _value(self, target: Any, name: str, fqn: str) -> Any:
        kind = type(target)
        is_sequence = kind is list or kind is tuple
        if isinstance(target, Tensor) or kind in _DICT_KINDS or (is_sequence and not is_plain_sequence(target)):
            raise _mismatch(fqn, "a plain value", target)
        value = self._builder.value(name)
        if kind is list and type(value) is list:
            target[:] = value
            return target
        return value

    def _dict(self, target: Any, node: dict[str, Any], tag: str, fqn: str, depth: int) -> Any:
        entries = self._builder.entries(node[tag])
        self._compare(target, entries, fqn)
        for key, old in target.items():  # in the target's order, which is the Statefuls'
            if key in entries:
                new = self.merge(old, entries[key], _join(fqn, key), depth + 1)
                if new is not old:
                    target[key] = new
        if "metadata" in node and isinstance(target, OrderedDict):
            vars(target)["_metadata"] = self._builder.metadata(node)
        return target

    def _sequence(self, target: Sequence[Any], nodes: list[Any], fqn: str, depth: int) -> Any:
        self._compare(range(len(target)), range(len(nodes)), fqn)
        merged = list(target)
        for index, (old, item) in enumerate(zip(target, nodes, strict=False)):
            merged[index] = self.merge(old, item, _join(fqn, index), depth + 1)
        if all(new is old for new, old in zip(merged, target, strict=True)):
            return target
        if isinstance(target, list):
            target[:] = merged
            return target
        return tuple(merged)

    def _compare(self, ours: Any, theirs: Any, fqn: str) -> None:
        """Raises where one side has entries that the other lacks, unless that is allowed."""
        if not self._strict:
            return
        missing = [_join(fqn, key) for key in ours if key not in theirs]
        unexpected = [_join(fqn, key) for key in theirs if key not in ours]
        if missing or unexpected:
            message = f"the state and the checkpoint differ at {fqn!r}: missing in the checkpoint: {missing[:10]!r}"
            message += f"; only in the checkpoint: {unexpected[:10]!r:.1000}"
            raise StateMismatch(message, missing=missing, unexpected=unexpected)


def _join(fqn: str, key: Any) -> str:
    return f"{fqn}.{key}" if fqn else str(key)


def _mismatch(fqn: str, stored: str, target: Any) -> StateMismatch:
    kind = f"{type(target).__module__}.{type(target).__qualname__}"
    return StateMismatch(f"{fqn!r} is {stored} in the checkpoint, and a {kind} in the state", mismatched=[fqn])
