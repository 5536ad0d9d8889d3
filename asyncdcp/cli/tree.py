"""A checkpoint's names as a tree that fits a screen: chains joined, layers that are alike shown once. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import NamedTuple

_DEPTH = 60
"""What is nested deeper stands as one label."""


class Leaf(NamedTuple):
    """A tensor or a plain value. ``kind`` is the dtype or the value as text; ``alike`` is what folding compares."""

    kind: str
    shape: str
    size: int
    chunks: int
    files: str
    is_tensor: bool

    @property
    def alike(self) -> tuple[object, ...]:
        return (self.kind, self.shape, self.size, self.chunks)


@dataclass(frozen=True)
class Node:
    """``times`` siblings that are alike stand as one node, whose label names the first and the last."""

    label: str
    leaf: Leaf | None = None
    children: tuple[Node, ...] = ()
    times: int = 1

    @property
    def size(self) -> int:
        """Bytes of the tensors in it, all times."""
        own = self.leaf.size if self.leaf else 0
        return self.times * (own + sum(child.size for child in self.children))

    @property
    def tensors(self) -> int:
        """How many tensors are in it, all times."""
        own = int(self.leaf is not None and self.leaf.is_tensor)
        return self.times * (own + sum(child.tensors for child in self.children))

    @property
    def values(self) -> int:
        """How many plain values are in it, all times."""
        own = int(self.leaf is not None and not self.leaf.is_tensor)
        return self.times * (own + sum(child.values for child in self.children))

    def alike(self) -> tuple[object, ...]:
        """Equal for nodes that differ in nothing but their label."""
        leaf = self.leaf.alike if self.leaf else None
        return (leaf, self.times, tuple((child.label, child.alike()) for child in self.children))


@dataclass
class _Growing:
    leaf: Leaf | None = None
    children: dict[str, _Growing] = field(default_factory=dict)


class Row(NamedTuple):
    """A line of the tree; ``branch`` are the strokes in front of the label."""

    branch: str
    node: Node
    closed: bool


def grow(leaves: Iterable[tuple[str, Leaf]]) -> tuple[Node, ...]:
    """The tree of FQNs, in their order."""
    root = _Growing()
    for name, leaf in leaves:
        place = root
        for part in name.split(".", _DEPTH):
            place = place.children.setdefault(part, _Growing())
        place.leaf = leaf
    return tuple(_joined(label, child) for label, child in root.children.items())


def _joined(label: str, place: _Growing) -> Node:
    """Names are as deep as their dots, so this is iterative where a chain has no branches."""
    while place.leaf is None and len(place.children) == 1:
        ((part, place),) = place.children.items()
        label = f"{label}.{part}"
    return Node(label, place.leaf, tuple(_joined(part, child) for part, child in place.children.items()))


def folded(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """The tree with runs of numbered siblings that are alike (the layers of a model) as one node each."""
    result: list[Node] = []
    before: tuple[object, ...] | None = None
    for node in nodes:
        made = _folded(node)
        number, _, rest = node.label.partition(".")
        mark = (rest, made.alike()) if number.isdecimal() and (made.children or made.leaf) else None
        if mark is not None and mark == before:
            first = result[-1]
            start = first.label.partition(".")[0].partition("…")[0]
            label = f"{start}…{number}" + (f".{rest}" if rest else "")
            result[-1] = replace(first, label=label, times=first.times + 1)
        else:
            result.append(made)
        before = mark
    return tuple(result)


def _folded(node: Node) -> Node:
    """A node whose children are folded; where one is left of them, they share a line."""
    children = folded(node.children)
    if node.leaf is None and len(children) == 1 and children[0].times > 1:
        return replace(children[0], label=f"{node.label}.{children[0].label}")
    return replace(node, children=children)


def deep(nodes: Iterable[Node], depth: int) -> set[int]:
    """The ids of the nodes that are open where ``depth`` levels are shown."""
    level, found = [*nodes], set[int]()
    while level and depth > 1:
        found.update(map(id, level))
        level, depth = [child for node in level for child in node.children], depth - 1
    return found


def overview(nodes: Sequence[Node], lines: int) -> set[int]:
    """The ids of the nodes to open so that about so many lines tell the most: those with few children first.

    Numbered siblings are opened all or none, so that a list of layers looks like one.
    """
    found, left, order = set[int](), lines - len(nodes), count()
    waiting = [(_lines_in(group), next(order), group) for group in _groups(nodes)]
    heapq.heapify(waiting)
    while waiting and waiting[0][0] <= left:
        more, _, group = heapq.heappop(waiting)
        left -= more
        found.update(map(id, group))
        for node in group:
            for deeper in _groups(node.children):
                heapq.heappush(waiting, (_lines_in(deeper), next(order), deeper))
    return found


def _groups(siblings: Sequence[Node]) -> list[list[Node]]:
    """Siblings with children: those that are numbered together, the others each by itself."""
    parents = [node for node in siblings if node.children]
    numbered = [node for node in parents if node.label[:1].isdecimal()]
    return [[node] for node in parents if not node.label[:1].isdecimal()] + ([numbered] if numbered else [])


def _lines_in(group: Sequence[Node]) -> int:
    return sum(len(node.children) for node in group)


def rows(nodes: Sequence[Node], opened: Container[int], indent: str = "", level: int = 0) -> Iterator[Row]:
    """The lines of the tree, as far as it is opened; a node whose children are not shown is ``closed``."""
    for node in nodes:
        last = node is nodes[-1]
        stroke, space = ("", "") if level == 0 else ("└─ ", "   ") if last else ("├─ ", "│  ")
        closed = id(node) not in opened
        yield Row(indent + stroke, node, closed=closed and bool(node.children))
        if not closed:
            yield from rows(node.children, opened, indent + space, level + 1)
