"""Who reads what in a load of several ranks: bytes that several of them want are read by one, which passes them on.

Each rank tells which ranges of which files it is to read. Equal ranges of several ranks are cut and packed into units,
each wanted whole by the same ranks. A unit is read by that one of them that has the least to read yet, so that all of
them read alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import msgspec

from asyncdcp.format.blocks import BLOCK_BYTES, SLAB_BYTES
from asyncdcp.planning.load_plan import ReadItem, in_batches

_UNITS = 8
"""So many units there are for each rank, or more, where units of a block allow it: then the sums come out even."""

Range: TypeAlias = tuple[int, int, int]
"""The number of a file, begin and end."""


class Wanted(msgspec.Struct):
    """The ranges that a rank is to read; ``ranges`` are of ``files`` by number, each once."""

    files: list[str]
    ranges: list[Range]

    @classmethod
    def of(cls, items: Sequence[ReadItem]) -> Wanted:
        """The ranges of a plan's items."""
        numbers: dict[str, int] = {}
        ranges = {(numbers.setdefault(item.file, len(numbers)), item.begin, item.end): None for item in items}
        return cls(list(numbers), list(ranges))


class Unit(msgspec.Struct, array_like=True):
    """What is read and passed on at once: ``pieces``, one after another, by ``reader`` to the others of group
    ``group``.
    """

    reader: int
    group: int
    pieces: list[Range]

    @property
    def nbytes(self) -> int:
        return sum(end - begin for _, begin, end in self.pieces)


class SharedReads(msgspec.Struct):
    """The units in the order in which all ranks go through them; groups are ranks, ``files`` names. No unit has more
    than ``unit_bytes``, a slab at most.
    """

    unit_bytes: int = BLOCK_BYTES
    files: list[str] = []
    groups: list[list[int]] = []
    units: list[Unit] = []


def share_reads(told: Sequence[Wanted]) -> SharedReads:
    """What is wanted by more than one rank, and by whom each of it is read."""
    files: dict[str, int] = {}
    wanted: dict[Range, list[int]] = {}
    for rank, own in enumerate(told):
        numbers = [files.setdefault(name, len(files)) for name in own.files]
        for file, begin, end in own.ranges:
            wanted.setdefault((numbers[file], begin, end), []).append(rank)
    shared = {span: tuple(ranks) for span, ranks in sorted(wanted.items()) if len(ranks) > 1}
    size = _unit_bytes(sum(end - begin for _, begin, end in shared), len(told))
    groups: dict[tuple[int, ...], int] = {}
    pieces: dict[int, list[Range]] = {}
    for span, ranks in shared.items():
        pieces.setdefault(groups.setdefault(ranks, len(groups)), []).extend(cut(span, size))
    loads, members, units = [0] * len(told), [list(ranks) for ranks in groups], []
    packs = {group: list(in_batches(found, _length, size)) for group, found in pieces.items()}
    for group, packed in _in_turns(packs):
        unit = Unit(min(members[group], key=loads.__getitem__), group, packed)
        loads[unit.reader] += unit.nbytes
        units.append(unit)
    return SharedReads(size, list(files), members, units)


def _length(piece: Range) -> int:
    return piece[2] - piece[1]


def _unit_bytes(total: int, ranks: int) -> int:
    blocks = total // (_UNITS * ranks) // BLOCK_BYTES
    return min(SLAB_BYTES, max(1, blocks) * BLOCK_BYTES)


def cut(span: Range, unit_bytes: int) -> Iterator[Range]:
    """The parts of a range between multiples of ``unit_bytes``. No element is cut where ranges begin at whole ones."""
    file, begin, end = span
    while begin < end:
        border = min(end, (begin // unit_bytes + 1) * unit_bytes)
        yield file, begin, border
        begin = border


def _in_turns(units: dict[int, list[list[Range]]]) -> Iterator[tuple[int, list[Range]]]:
    """One of each group after another, so that no group waits for all others."""
    most = max(map(len, units.values()), default=0)
    for number in range(most):
        for group, packed in units.items():
            if number < len(packed):
                yield group, packed[number]
