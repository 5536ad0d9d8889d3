"""What may be left on a simulated disk when its power is lost: all of it where that is little, else a seeded sample.

For each file that was changed since its fsync: none of the changes, some from the beginning, the last of them torn at
512 bytes or 4 KiB from either end, all but one, only one. For each directory whose entries changed since its fsync: any
of the changes, those of one name in their order. Every file and directory by itself, as a disk that reorders does.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from math import prod
from typing import Final, TypeAlias

from asyncdcp.testing.disk import Node, Resize, SimulatedDisk, Write, renamed, replayed

TORN: Final = (512, 4096)
_SUBSETS: Final = 6
"""Up to so many name changes of one directory, all their subsets are looked at."""

_Entries: TypeAlias = dict[str, Node]
_Choice: TypeAlias = "dict[Node, bytes | _Entries]"


def remains(disk: SimulatedDisk, limit: int, seed: int = 0) -> Iterator[dict[str, bytes | None]]:
    """Images that a loss of power now may leave, each once: all if there are at most ``limit``, else about so many.

    Of more, those in which one file or directory differs from "nothing that was not synced is there" or "all of it is"
    come first, then others by chance, the same for the same ``seed``. To be called while the disk stands still.
    """
    nodes = [node for node in _reachable(disk.root) if node.changes or node.names]
    options = [_names(node) if node.is_directory else _contents(node) for node in nodes]
    seen = set[tuple[tuple[str, bytes | None], ...]]()
    for chosen in _combinations(options, limit, random.Random(seed)):
        image = dict(_image(disk.root, dict(zip(nodes, chosen, strict=True))))
        key = tuple(sorted(image.items()))
        if key not in seen:
            seen.add(key)
            yield image


def _reachable(root: Node) -> list[Node]:
    """Everything that has a name, had a durable one, or got one since."""
    found, waiting = dict[Node, None](), [root]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found[node] = None
            waiting += [*node.durable_entries.values(), *node.entries.values()]
            waiting += [new for change in node.names for _, new in change if new is not None]
    return list(found)


def _combinations(
    options: Sequence[Sequence[bytes | _Entries]], limit: int, rng: random.Random
) -> Iterator[tuple[bytes | _Entries, ...]]:
    """Choices of one option each. The first option of each is "nothing", the last "everything"."""
    if prod(map(len, options)) <= limit:
        yield from itertools.product(*options)
        return
    for base in ([choice[0] for choice in options], [choice[-1] for choice in options]):
        for number, choices in enumerate(options):
            for choice in choices:
                yield (*base[:number], choice, *base[number + 1 :])
    for _ in range(max(0, limit - 2 * sum(map(len, options)))):
        yield tuple(rng.choice(choices) for choices in options)


def _contents(node: Node) -> list[bytes | _Entries]:
    """What a file may hold, nothing new first, everything last."""
    changes, count = node.changes, len(node.changes)
    histories: list[list[Write | Resize]] = [[]]
    for number, change in enumerate(changes):
        before = changes[:number]
        histories += [[*before, torn] for torn in _torn(change)]
        histories += [[change], before + changes[number + 1 :]]
    histories += [changes[:number] for number in range(1, count + 1)]
    found: dict[bytes, None] = {}
    for history in histories:
        found[replayed(node.durable, history)] = None
    whole = replayed(node.durable, changes)
    found.pop(whole, None)
    return [*found, whole]


def _torn(change: Write | Resize) -> Iterator[Write]:
    if isinstance(change, Resize):
        return
    for unit in TORN:
        last = (len(change.data) - 1) // unit * unit
        for cut in {unit, last}:
            if 0 < cut < len(change.data):
                yield Write(change.offset, change.data[:cut])
                yield Write(change.offset + cut, change.data[cut:])


def _names(node: Node) -> list[bytes | _Entries]:
    """What a directory may list, nothing new first, everything last."""
    count = len(node.names)
    everything = (1 << count) - 1
    if count <= _SUBSETS:
        masks = list(range(1 << count))
    else:
        prefixes = [(1 << number) - 1 for number in range(count)]
        single = [1 << number for number in range(count)]
        masks = [*prefixes, *single, *(everything & ~one for one in single), everything]
    return [
        renamed(node.durable_entries, [change for n, change in enumerate(node.names) if mask >> n & 1])
        for mask in masks
    ]


def _image(root: Node, chosen: _Choice) -> Iterator[tuple[str, bytes | None]]:
    waiting = [("", root)]
    while waiting:
        path, directory = waiting.pop()
        entries = chosen.get(directory, directory.durable_entries)
        assert isinstance(entries, dict)
        for name, node in entries.items():
            if node.is_directory:
                yield f"{path}/{name}", None
                waiting.append((f"{path}/{name}", node))
            else:
                content = chosen.get(node, node.durable)
                assert isinstance(content, bytes)
                yield f"{path}/{name}", content
