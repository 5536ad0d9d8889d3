"""A part of a state, chosen by FQN: what ``save(keys=…)`` stores and ``load(keys=…)`` makes anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from asyncdcp.pipeline.globs import Globs, nothing_matched
from asyncdcp.pipeline.trees import KEYED, LISTED
from asyncdcp.state_dict.flatten import FlatState
from asyncdcp.state_dict.keys import decode_key
from asyncdcp.state_dict.options import check_keys
from asyncdcp.state_dict.subclasses import inner_names


def prune(tree: Any, keep: Callable[[str], bool], fqn: str = "") -> Any:
    """The tree, which stands at ``fqn``, without the leaves that ``keep`` refuses; None if nothing is left of it.

    Dicts lose entries. A list or tuple, whose entries are named by position, is kept whole where any entry is kept.
    A tensor subclass is one tensor here, of its own FQN. A dict that was empty before has no leaf that could speak for
    it: it is kept where its own FQN is, or all that would be in it. ``keep`` is asked of all of them.
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
            return tree if any([keep(fqn), keep(prefix)]) else None
        entries = ((key, prune(node, keep, f"{prefix}{decode_key(key)}")) for key, node in zip(*content, strict=True))
        left = [(key, part) for key, part in entries if part is not None]
        return {**tree, tag: [[key for key, _ in left], [part for _, part in left]]} if left else None
    if tag in LISTED:
        kept = [prune(node, keep, f"{prefix}{number}") is not None for number, node in enumerate(content)]
        return tree if any(kept) else None
    inner = prune(content, keep, fqn)
    return None if inner is None else {tag: inner}


def choose(tree: Any, keys: Sequence[str], known: Iterable[str] = ()) -> tuple[Any, list[str]]:
    """What the globs ``keys`` choose of a tree, None if nothing; and those of them that choose nothing, not even of
    the names ``known``.
    """
    globs = Globs(keys)
    names = list(known)

    def keep(name: str) -> bool:
        if chosen := globs.match(name):
            names.append(name)
        return chosen

    return prune(tree, keep), globs.idle(names)


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


def select(flat: FlatState, keys: Sequence[str], *, alone: bool = True) -> FlatState:
    """The part of a flattened state whose leaves match one of the globs ``keys``. A tied tensor is stored under the
    first name kept. ``InvalidOption`` for a glob that matches nothing; not if this process is not ``alone``: another
    may hold what it matches, and this one nothing that any of them does.
    """
    check_keys(keys)
    tree, idle = choose(flat.tree, keys)
    if idle and alone:
        raise nothing_matched(idle, "the state")
    if tree is None:
        tree = _emptied(flat.tree)
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
    subclasses = {name: part for name, part in flat.subclasses.items() if not names.isdisjoint(inner_names(part.node))}
    return replace(flat, tree=tree, tensors=tensors, aliases=aliases, values=values, subclasses=subclasses)


def _emptied(tree: Any) -> Any:
    """A tree's outermost container with nothing in it: the trees of all ranks are put together, and have to fit."""
    tag = next(iter(tree))
    if tag in KEYED:
        return {**tree, tag: [[], []]}
    if tag in LISTED:
        return {tag: []}
    return {"dict": [[], []]} if tag in ("t", "v", "subclass") else {tag: _emptied(tree[tag])}
