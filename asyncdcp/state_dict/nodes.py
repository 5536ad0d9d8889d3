"""The containers of a checkpoint's tree by their FQNs, so that a Stateful's part can be found by itself; and what is
matched by them: its tensor subclasses with the state's, each filled as a whole or not at all, and extra states.

An extra state is what a module stores of its own (``get_extra_state``). Whatever a checkpoint has is given to
``set_extra_state``, as torch does, so for these entries the checkpoint decides, where both sides have one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from asyncdcp.errors import CorruptCheckpoint
from asyncdcp.pipeline.trees import KEYED, LISTED
from asyncdcp.state_dict.flatten import FlatState
from asyncdcp.state_dict.keys import decode_key
from asyncdcp.state_dict.subclasses import check_node, difference, inner_names, show
from asyncdcp.state_dict.unflatten import module_metadata
from asyncdcp.state_dict.values import MAX_DEPTH

_ROOT = re.compile(r"(?:.*?\.)?_extra_state(?=[.#]|$)", re.DOTALL)
_MARKS = ("stateful", "per_rank")


def is_extra_state(key: object) -> bool:
    """Whether a dict's key is one under which a module's ``state_dict()`` has what ``get_extra_state`` gave."""
    return isinstance(key, str) and (key == "_extra_state" or key.endswith("._extra_state"))


def extra_state_of(name: str) -> str | None:
    """The FQN of the extra state to which ``name`` belongs, or that it is; None if it is of none."""
    found = _ROOT.match(name)
    return None if found is None else found[0]


class TreeNodes:
    """Finds nodes by FQN; ``renamed`` maps the checkpoint's names to the state's, under which they are then found.

    Marks around a node are passed over. Of two containers of one name, as in ``{"a": {"b": optimizer}, "a.b": {}}``, a
    Stateful's is found. Malformed parts raise ``CorruptCheckpoint``.
    """

    def __init__(self, tree: Any, renamed: Callable[[str], str], *, allow_pickle: bool = False) -> None:
        self._allow_pickle = allow_pickle
        self._nodes: dict[str, Any] = {}
        self._statefuls: set[str] = set()
        self._outer: dict[str, str] = {}
        self.subclasses: dict[str, dict[str, Any]] = {}
        """The nodes of tensor subclasses by the checkpoint's own names, without those inside others."""
        self.extra_states: dict[str, Any] = {}
        """The nodes, of leaves too, of what modules store of their own."""
        self._renamed = renamed
        self._walk(tree, "", 0)

    def __contains__(self, fqn: str) -> bool:
        return fqn in self._nodes

    def get(self, fqn: str) -> Any:
        """The node that stands at ``fqn``, None if there is none."""
        return self._nodes.get(fqn)

    def outer(self, name: str) -> str:
        """The checkpoint's name of the subclass in which its tensor ``name`` is; of all others, their own."""
        return self._outer.get(name, name)

    def state_name(self, name: str) -> str:
        """The state's name for the checkpoint's tensor or value ``name``: subclasses are renamed as a whole."""
        outer = self.outer(name)
        return self._renamed(outer) + name[len(outer) :]

    def versions(self, fqn: str) -> Mapping[str, Mapping[str, object]] | None:
        """The ``_metadata`` of the module state at ``fqn``; None if it has none."""
        node = self._nodes.get(fqn)
        if not isinstance(node, dict) or not isinstance(node.get("metadata"), str):
            return None
        metadata = self.metadata(node)
        return metadata if isinstance(metadata, Mapping) else None

    def metadata(self, node: dict[str, Any]) -> Any:
        """The ``_metadata`` that an ordered node carries."""
        return module_metadata(node, allow_pickle=self._allow_pickle)

    def _walk(self, node: Any, fqn: str, depth: int, *, stateful: bool = False) -> None:
        if depth > 2 * MAX_DEPTH or not isinstance(node, dict) or not node:
            raise CorruptCheckpoint(f"the tree is malformed or nested too deeply at {fqn!r:.200}")
        tag = next(iter(node))
        content = node[tag]
        if tag in _MARKS:
            self._walk(content, fqn, depth + 1, stateful=stateful or tag == "stateful")
            return
        name = self._renamed(fqn)
        if stateful or name not in self._statefuls:
            self._nodes[name] = node
        if stateful:
            self._statefuls.add(name)
        if tag == "subclass":
            self._subclass(node, fqn)
        elif tag in KEYED:
            self._entries(content, fqn, depth)
        elif tag in LISTED and isinstance(content, list):
            for number, item in enumerate(content):
                if _is_container(item):
                    self._walk(item, _join(fqn, number), depth + 1)

    def _entries(self, content: Any, fqn: str, depth: int) -> None:
        if not isinstance(content, list) or len(content) != 2 or not all(isinstance(part, list) for part in content):
            raise CorruptCheckpoint(f"the tree has a dict that is not its keys and nodes at {fqn!r:.200}")
        for key, item in zip(*content, strict=False):
            if is_extra_state(key):
                self.extra_states[self._renamed(_join(fqn, key))] = item
            if _is_container(item):
                self._walk(item, _join(fqn, decode_key(key)), depth + 1)

    def _subclass(self, node: dict[str, Any], fqn: str) -> None:
        check_node(node)
        if node["name"] != fqn:
            raise CorruptCheckpoint(f"the tree has the tensor subclass {node['name']!r:.200} at {fqn!r:.200}")
        self.subclasses[fqn] = node
        self._outer.update(dict.fromkeys(inner_names(node), fqn))


def _is_container(node: Any) -> bool:
    """Leaves, by far the most, need no walk."""
    return not (isinstance(node, dict) and ("t" in node or "v" in node))


def _join(fqn: str, key: Any) -> str:
    return f"{fqn}.{key}" if fqn else str(key)


@dataclass
class Comparison:
    """What came of it. Names are the state's unless said otherwise."""

    pairs: dict[str, str] = field(default_factory=dict)
    """The checkpoint's name for each subclass that is alike on both sides."""
    problems: dict[str, str] = field(default_factory=dict)
    """What tells two apart that have one name."""
    told: set[str] = field(default_factory=set)
    """Names of tensors and values, on either side, that belong to ``problems``."""
    unpaired: set[str] = field(default_factory=set)
    """Inner tensors of the state that must not be filled, for the rest of their subclass has no counterpart."""


def compare(flat: FlatState, nodes: TreeNodes, have: Mapping[str, str], sources: Mapping[str, str]) -> Comparison:
    """Compares what has the same name. ``have`` are the checkpoint's names that are to be loaded, by the state's for
    them; ``sources`` pairs single tensors and values.
    """
    result = Comparison()
    composed = {nodes.state_name(name): name for name in nodes.subclasses if _is_wanted(nodes, name, have)}
    for fqn, own in flat.subclasses.items():
        leaves = [*inner_names(own.node)]
        found = {nodes.outer(sources[name]) for name in leaves if name in sources}
        stored = next(iter(found), None) or composed.get(fqn) or have.get(fqn)
        node = nodes.subclasses.get(stored) if stored is not None else None
        whole = len(found) == 1 and all(name in sources for name in leaves)
        if stored is not None and (node is None or difference(own.node, node) is not None):
            there = difference(own.node, node) if node is not None else None
            result.problems[fqn] = there or f"{show(own.node)} in the state, no subclass in the checkpoint"
            result.told.update({fqn, *leaves, *_inner(nodes, stored)})
        elif stored is not None and whole:
            result.pairs[fqn] = stored
        if fqn not in result.pairs:
            result.unpaired.update(leaves)
    for fqn, stored in composed.items():
        if fqn in flat.tensors or fqn in flat.aliases or fqn in flat.values:
            result.problems[fqn] = f"no subclass in the state, {show(nodes.subclasses[stored])} in the checkpoint"
            result.told.update({fqn, *_inner(nodes, stored)})
    return result


def _is_wanted(nodes: TreeNodes, stored: str, have: Mapping[str, str]) -> bool:
    return any(nodes.state_name(name) in have for name in inner_names(nodes.subclasses[stored]))


def _inner(nodes: TreeNodes, stored: str) -> list[str]:
    node = nodes.subclasses.get(stored)
    return [] if node is None else [nodes.state_name(name) for name in inner_names(node)]
