"""Pairs the tensor subclasses of a state with those of a checkpoint; each is filled as a whole, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from asyncdcp.state_dict.flatten import FlatState
from asyncdcp.state_dict.nodes import TreeNodes
from asyncdcp.state_dict.subclasses import difference, inner_names, show


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
