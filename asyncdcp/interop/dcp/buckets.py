"""Which items of a save plan go to which file."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from torch.distributed.checkpoint.planner import WriteItem


class Bucket(NamedTuple):
    """The items of one file, values first, and the bytes of each."""

    name: str
    items: list[WriteItem]
    sizes: list[int]


def split(items: Sequence[WriteItem], prefix: str, count: int | None) -> list[Bucket]:
    """So many files of about equal size, in which every item stands in the plan's order; a file each for None."""
    if count is None:
        groups = [[item] for item in items]
    elif count == 1:
        groups = [list(items)]
    else:
        groups = _balanced(items, count)
    return [_bucket(f"{prefix}{number}.distcp", group) for number, group in enumerate(groups)]


def _balanced(items: Sequence[WriteItem], count: int) -> list[list[WriteItem]]:
    """The largest first, each to the group that has the least."""
    groups: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for index in sorted(range(len(items)), key=lambda index: -_size(items[index])):
        filled, number = heapq.heappop(heap)
        groups[number].append(index)
        heapq.heappush(heap, (filled + max(_size(items[index]), 1), number))
    return [[items[index] for index in sorted(group)] for group in groups]


def _bucket(name: str, items: list[WriteItem]) -> Bucket:
    ordered = sorted(items, key=lambda item: item.tensor_data is not None)
    return Bucket(name, ordered, [_size(item) for item in ordered])


def _size(item: WriteItem) -> int:
    """A chunk's bytes as far as the plan knows; a value's are not known before it is serialized."""
    data = item.tensor_data
    return 0 if data is None else prod(data.chunk.sizes) * data.properties.dtype.itemsize
