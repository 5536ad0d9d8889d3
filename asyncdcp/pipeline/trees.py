"""The trees of several ranks as one: what only some ranks hold (pipeline stages, experts) is put where they hold it.

A tree is tagged JSON, made by ``state_dict.flatten``; here only what merging needs of it is understood. Nothing is
taken on trust, and nothing is checked either that a tree's reader checks: where two trees do not fit, the first counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from asyncdcp.errors import CorruptCheckpoint

KEYED = ("dict", "ordered", "defaultdict")
LISTED = ("list", "tuple")
"""The tags of containers: entries by key, and by position."""
_WRAPPERS = ("stateful", "per_rank")
_LEAVES = ("t", "v")
_DEPTH = 300


def merge_trees(trees: Sequence[msgspec.Raw], hidden: Sequence[Collection[str]]) -> msgspec.Raw:
    """The first tree, with what only later ones have. ``hidden[n]`` are the leaves of tree ``n`` that are left out.

    ``CorruptCheckpoint`` for what is not JSON, or nested too deep, if it had to be looked at.
    """
    unlike = list(dict.fromkeys((bytes(tree), frozenset(gone)) for tree, gone in zip(trees, hidden, strict=True)))
    if len(unlike) == 1 and not unlike[0][1]:
        return trees[0]
    try:
        merged: Any = None
        for data, gone in unlike:
            tree = _without(msgspec.json.decode(data), gone, 0)
            merged = tree if merged is None else _merged(merged, tree, 0)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"the tree of a rank is not JSON, or nested too deep ({error})") from error
    return msgspec.Raw(msgspec.json.encode({"dict": [[], []]} if merged is None else merged))


def _without(node: Any, gone: Collection[str], depth: int) -> Any:
    """The tree without some leaves; None where nothing is left that held one. Entries of lists stay where they are: a
    list that has lost some is gone as a whole.
    """
    if not gone or type(node) is not dict or not node or depth > _DEPTH:
        return node
    tag = next(iter(node))
    content = node[tag]
    if tag in _LEAVES:
        return None if isinstance(content, str) and content in gone else node
    if tag == "subclass":
        return None if f"{node.get('name')}" in gone or _inner_gone(content, gone) else node
    if tag in _WRAPPERS:
        inner = _without(content, gone, depth + 1)
        return None if inner is None else {tag: inner}
    if tag in LISTED and isinstance(content, list):
        items = [_without(item, gone, depth + 1) for item in content]
        return {**node, tag: items} if None not in items else None
    if tag in KEYED and _is_keyed(content):
        kept = [(key, _without(item, gone, depth + 1)) for key, item in zip(*content, strict=True)]
        kept = [(key, item) for key, item in kept if item is not None]
        if content[0] and not kept:
            return None
        return {**node, tag: [[key for key, _ in kept], [item for _, item in kept]]}
    return node


def _inner_gone(content: Any, gone: Collection[str]) -> bool:
    parts = content if isinstance(content, list) else []
    return any(isinstance(part, list) and len(part) == 2 and _without(part[1], gone, 1) is None for part in parts)


def _merged(first: Any, second: Any, depth: int) -> Any:
    if second is None or type(first) is not dict or type(second) is not dict or not first or not second:
        return first
    tag = next(iter(first))
    if tag != next(iter(second)) or depth > _DEPTH:
        return first
    ours, theirs = first[tag], second[tag]
    if tag in _WRAPPERS:
        return {tag: _merged(ours, theirs, depth + 1)}
    if tag in KEYED and _is_keyed(ours) and _is_keyed(theirs):
        return {**first, tag: _merged_entries(ours, theirs, depth)}
    if tag in LISTED and isinstance(ours, list) and isinstance(theirs, list):
        common = [_merged(a, b, depth + 1) for a, b in zip(ours, theirs, strict=False)]
        return {tag: [*common, *ours[len(common) :], *theirs[len(common) :]]}
    return first


def _merged_entries(ours: list[list[Any]], theirs: list[list[Any]], depth: int) -> list[list[Any]]:
    nodes = {msgspec.json.encode(key): (key, node) for key, node in zip(*ours, strict=True)}
    for key, node in zip(*theirs, strict=True):
        text = msgspec.json.encode(key)
        nodes[text] = (key, _merged(nodes[text][1], node, depth + 1)) if text in nodes else (key, node)
    return [[key for key, _ in nodes.values()], [node for _, node in nodes.values()]]


def _is_keyed(content: Any) -> bool:
    return (
        isinstance(content, list)
        and len(content) == 2
        and all(isinstance(column, list) for column in content)
        and len(content[0]) == len(content[1])
    )


def merge_values(values: Iterable[tuple[Mapping[str, msgspec.Raw], Collection[str]]]) -> dict[str, msgspec.Raw]:
    """All values, but for those named beside them; of one name the first counts."""
    merged: dict[str, msgspec.Raw] = {}
    for mapping, gone in values:
        for name, value in mapping.items():
            if name not in gone:
                merged.setdefault(name, value)
    return merged


def names_in(tree: Any, fqn: str = "") -> Iterator[str]:
    """All names by which something of a tree, which stands at ``fqn``, can be chosen, as ``state_dict.pruning`` has it:
    leaves, tensor subclasses, and empty dicts, each as itself and as all that would be in it.
    """
    tag = next(iter(tree))
    content, prefix = tree[tag], f"{fqn}." if fqn else ""
    if tag in _LEAVES:
        yield content
    elif tag == "subclass":
        yield tree["name"]
    elif tag in _WRAPPERS:
        yield from names_in(content, fqn)
    else:
        keys, nodes = content if tag in KEYED else (range(len(content)), content)
        if tag in KEYED and not keys:
            yield from (fqn, prefix)
        for key, node in zip(keys, nodes, strict=True):
            yield from names_in(node, f"{prefix}{_key(key)}")


def _key(encoded: Any) -> Any:
    """A dict's key, as ``state_dict.keys`` has encoded it."""
    if type(encoded) is not dict:
        return encoded
    ((tag, content),) = encoded.items()
    if tag == "tuple":
        return tuple(map(_key, content))
    return float.fromhex(content) if tag == "float" else int(content, 16) if tag == "int" else content
