"""States put together again from a tree and its tables."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import msgspec
from torch import Tensor

from asyncdcp.errors import CorruptCheckpoint
from asyncdcp.pipeline.trees import KEYED, LISTED
from asyncdcp.state_dict.keys import decode_key
from asyncdcp.state_dict.subclasses import FIELDS, cannot_be_made, check_node
from asyncdcp.state_dict.values import FACTORIES, MAX_DEPTH, decode_value

_DICT_KINDS = (dict, OrderedDict, defaultdict)
_WRAPPERS = ("stateful", "per_rank")
_SECOND_FIELD = {"ordered": "metadata", "defaultdict": "factory"}


def unflatten(
    tree: Any, tensors: Mapping[str, Tensor], values: Mapping[str, Any], *, allow_pickle: bool = False
) -> Any:
    """A new state. ``tensors`` has the aliases' names too; tied names that map to one tensor come back as one. Tensor
    subclasses are taken from there by their own names; ``UnsupportedValue`` for one that is not there.

    Statefuls and PerRanks come back as the plain state that they held. The tree is not trusted: ``CorruptCheckpoint``
    for a node that ``flatten`` does not make, and for a name that is not in the tables or is used twice.
    """
    return _Builder(tensors, values, allow_pickle=allow_pickle).build(tree, 0)


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
        if tag == "subclass" and rest == list(FIELDS):
            check_node(node)
            return tag, node[tag]
        if len(rest) > 1 or (rest and _SECOND_FIELD.get(tag) != rest[0]):
            raise CorruptCheckpoint(f"the tree has a node of unknown fields: {tag!s:.40}, {rest[0]!s:.40}")
        content = node[tag]
        if tag in ("t", "v"):
            _expect(str, content, tag)
        elif tag in LISTED:
            _expect(list, content, tag)
        elif tag not in KEYED and tag not in _WRAPPERS:
            raise CorruptCheckpoint(f"the tree has a node of the unknown kind {tag!s:.40}")
        return tag, content

    def build(self, node: Any, depth: int) -> Any:
        tag, content = self.open(node, depth)
        if tag == "t":
            return self.tensor(content)
        if tag == "v":
            return self.value(content)
        if tag == "subclass":
            return self.subclass(node)
        if tag in LISTED:
            items = [self.build(item, depth + 1) for item in content]
            return items if tag == "list" else tuple(items)
        if tag in KEYED:
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

    def subclass(self, node: dict[str, Any]) -> Tensor:
        if node["name"] not in self._tensors:
            raise cannot_be_made(node)
        return self.tensor(node["name"])

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

    def _empty(self, tag: str, node: dict[str, Any]) -> dict[Any, Any]:
        if tag == "ordered":
            ordered: OrderedDict[Any, Any] = OrderedDict()
            if "metadata" in node:
                vars(ordered)["_metadata"] = module_metadata(node, allow_pickle=self._allow_pickle)
            return ordered
        if tag == "defaultdict":
            name = _expect(str, node.get("factory"), "factory")
            if name not in FACTORIES:
                raise CorruptCheckpoint(f"the tree has a defaultdict of the unknown factory {name:.40}")
            return defaultdict(FACTORIES[name])
        return {}


def module_metadata(node: dict[str, Any], *, allow_pickle: bool) -> Any:
    """The ``_metadata`` of a module's state, whose node has one."""
    text = _expect(str, node["metadata"], "metadata")
    try:
        encoded = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"the tree has malformed metadata: {error!s:.200}") from error
    return decode_value(encoded, "_metadata", allow_pickle=allow_pickle)


def _expect(kind: type, obj: Any, what: str) -> Any:
    if type(obj) is not kind:
        raise CorruptCheckpoint(f"the tree is malformed: {what}: {kind.__name__} expected, {type(obj).__name__} found")
    return obj
