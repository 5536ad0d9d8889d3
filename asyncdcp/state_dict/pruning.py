"""A part of a state, chosen by FQN: what ``save(keys=…)`` stores and ``load(keys=…)`` makes anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from asyncdcp.errors import InvalidOption
from asyncdcp.pipeline.trees import KEYED, LISTED
from asyncdcp.state_dict.flatten import FlatState
from asyncdcp.state_dict.keys import decode_key
from asyncdcp.state_dict.options import check_keys, key_pattern
from asyncdcp.state_dict.subclasses import inner_names


def prune(tree: Any, keep: Callable[[str], bool], fqn: str = "") -> Any:
    """The tree, which stands at ``fqn``, without the leaves that ``keep`` refuses; None if nothing is left of it.

    Dicts lose entries. A list or tuple, whose entries are named by position, is kept whole where any entry is kept.
    A tensor subclass is one tensor here, of its own FQN. A dict that was empty before has no leaf that could speak for
    it: it is kept where its own FQN is, or all that would be in it.
    """
    tag = next(iter(tree))
    content = tree[tag]
    if tag in ("t", "v"):
        return tree if keep(content) else None
    if tag == "subclass":
        return tree if keep(tree["name"]) else None
    prefix = f"{fqn}." if fqn else ""
    if tag in KEYED:
        if not content[0]:
            return tree if keep(fqn) or keep(prefix) else None
        entries = ((key, prune(node, keep, f"{prefix}{decode_key(key)}")) for key, node in zip(*content, strict=True))
        kept = [(key, part) for key, part in entries if part is not None]
        return {**tree, tag: [[key for key, _ in kept], [part for _, part in kept]]} if kept else None
    if tag in LISTED:
        chosen = (prune(node, keep, f"{prefix}{number}") for number, node in enumerate(content))
        return tree if any(node is not None for node in chosen) else None
    inner = prune(content, keep, fqn)
    return None if inner is None else {tag: inner}


def children(tag: str, content: Any) -> list[Any]:
    """The nodes in a container or mark, by its tag and content."""
    nodes: list[Any] = content[1] if tag in KEYED else content if tag in LISTED else [content]
    return nodes


def leaves(tree: Any) -> set[str]:
    """The FQNs of all leaves."""
    tag = next(iter(tree))
    content = tree[tag]
    if tag in ("t", "v"):
        return {content}
    if tag == "subclass":
        return set(inner_names(tree))
    return {name for node in children(tag, content) for name in leaves(node)}


def own_leaves(tree: Any) -> set[str]:
    """The FQNs of the leaves that are inside a ``PerRank``."""
    tag = next(iter(tree))
    content = tree[tag]
    if tag == "per_rank":
        return leaves(content)
    if tag in ("t", "v", "subclass"):
        return set()
    return {name for node in children(tag, content) for name in own_leaves(node)}


def select(flat: FlatState, keys: Sequence[str]) -> FlatState:
    """The part of a flattened state whose leaves match one of the globs ``keys``. A tied tensor is stored under the
    first name kept.
    """
    check_keys(keys)
    pattern = key_pattern(keys)
    tree = prune(flat.tree, lambda name: pattern.fullmatch(name) is not None)
    if tree is None:
        raise InvalidOption(
            f"keys={list(keys)!r} match nothing in the state; the globs are of whole FQNs, such as model.*"
        )
    names = leaves(tree)
    tensors = {name: tensor for name, tensor in flat.tensors.items() if name in names}
    aliases: dict[str, str] = {}
    promoted: dict[str, str] = {}
    for alias, name in flat.aliases.items():
        if alias not in names:
            continue
        if name in names:
            aliases[alias] = name
        elif name in promoted:
            aliases[alias] = promoted[name]
        else:
            promoted[name] = alias
            tensors[alias] = flat.tensors[name]
    values = {name: value for name, value in flat.values.items() if name in names}
    subclasses = {name: part for name, part in flat.subclasses.items() if pattern.fullmatch(name) is not None}
    return replace(flat, tree=tree, tensors=tensors, aliases=aliases, values=values, subclasses=subclasses)
