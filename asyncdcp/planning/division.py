"""Who writes what: the chunks that several ranks hold are divided among them, once for a structure and for all ranks.

A chunk that one rank alone holds is that rank's to write. Replicas that may be spread go to their holders by bytes, the
largest first, each to the one that has the least; what is too large for an even division is cut along its first
dimension. Other replicas come from their lowest holder, all of them, so that what belongs together stays so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import msgspec

from asyncdcp.boxes import Box
from asyncdcp.errors import ReplicaMismatch
from asyncdcp.planning.held_chunks import Group, HeldChunks, Holdings
from asyncdcp.planning.save_plan import ChunkSpec, Structure, TensorSpec

PART_BYTES = 64 << 10
"""Replicas are not cut into parts smaller than this."""
_UNEVEN = 0.05
"""Parts are this small a part of what a rank has to write on average, so that sums come out even."""
_SHOWN = 5
_MANY = 16
"""So many holders are compared as an array."""

Rows: TypeAlias = tuple[int, int]
"""First and one past the last row of a chunk; a chunk without dimensions has one."""


class Shares(msgspec.Struct):
    """For each rank and each of its chunks the rows that it is to write. Good from save number ``begin`` on."""

    rows: list[list[list[Rows]]]
    begin: int


def divide(holdings: Sequence[Holdings]) -> Shares:
    """Each rank's share. ``ReplicaMismatch`` lists what has one name and is not the same on all ranks."""
    held = HeldChunks(holdings)
    groups = held.groups()
    _check_replicas(holdings, held, groups)
    _check_values(holdings)
    shares = held.whole_shares()
    loads = held.sole_loads()
    spread: list[Group] = []
    for group in groups:
        for rank, number in group.holders:
            shares[rank][number] = []
        if group.spread:
            spread.append(group)
        else:
            rank, number = group.holders[0]
            shares[rank][number] = [(0, group.rows)]
            loads[rank] += group.nbytes
    limit = max(PART_BYTES, int(_UNEVEN * held.nbytes / len(holdings)))
    parts = [(part, group) for group in spread for part in _parts(group, limit)]
    parts.sort(key=lambda item: -_part_bytes(*item))
    balance = _Balance(loads)
    for part, group in parts:
        rank, number = group.holders[balance.give(group, _part_bytes(part, group))]
        shares[rank][number].append(part)
    for group in spread:
        for rank, number in group.holders:
            if len(shares[rank][number]) > 1:
                shares[rank][number] = _joined(shares[rank][number])
    return Shares(shares, max(each.save for each in holdings))


class _Balance:
    """Bytes that each rank is to write. ``give`` adds to the holder that has the least, the first of those that do."""

    def __init__(self, loads: list[int]) -> None:
        import numpy as np

        self._loads = loads
        self._array = np.array(loads, np.int64)

    def give(self, group: Group, nbytes: int) -> int:
        """The number of the holder among the group's."""
        if len(group.holders) < _MANY:
            loads = [self._loads[rank] for rank, _ in group.holders]
            chosen = loads.index(min(loads))
        else:
            chosen = int(self._array[group.ranks].argmin())
        rank = group.holders[chosen][0]
        self._loads[rank] += nbytes
        self._array[rank] += nbytes
        return chosen


def _check_replicas(holdings: Sequence[Holdings], held: HeldChunks, groups: Sequence[Group]) -> None:
    faults = dict(held.faults)
    for group in groups:
        marks = [holdings[rank].fingerprints[number] for rank, number in group.holders]
        if len({*marks} - {b""}) > 1:
            odd = next(n for n, mark in enumerate(marks) if mark and mark != next(filter(None, marks)))
            rank, lowest = group.holders[odd][0], group.holders[0][0]
            faults.setdefault(group.name, f"{group.name} has another content on rank {rank} than on rank {lowest}")
    _refuse(faults)


def _check_values(holdings: Sequence[Holdings]) -> None:
    first: dict[str, tuple[int, bytes]] = {}
    faults: dict[str, str] = {}
    for rank, held in enumerate(holdings):
        for name, digest in held.values.items():
            lowest, known = first.setdefault(name, (rank, digest))
            if known != digest:
                faults.setdefault(name, f"{name} has another value on rank {rank} than on rank {lowest}")
    _refuse(faults)


def _refuse(faults: dict[str, str]) -> None:
    if faults:
        raise replica_mismatch(list(faults), list(faults.values()))


def replica_mismatch(names: Sequence[str], faults: Sequence[str]) -> ReplicaMismatch:
    """The error that names what differs, and the ways out."""
    shown = "; ".join(faults[:_SHOWN]) + (f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else "")
    return ReplicaMismatch(
        f"the ranks hold different things under one name: {shown}. Wrap in PerRank what each rank has for itself (data "
        "loader positions, random generators), give what is not the same another name on each rank (pipeline stages), "
        "and hold a module itself rather than its state_dict(), so that buffers may differ",
        tensors=names,
    )


def _parts(group: Group, limit: int) -> Iterator[Rows]:
    count = min(group.rows, -(-group.nbytes // limit), 8 * len(group.holders)) or 1
    for number in range(count):
        yield group.rows * number // count, group.rows * (number + 1) // count


def _part_bytes(part: Rows, group: Group) -> int:
    return group.nbytes * (part[1] - part[0]) // max(group.rows, 1)


def _joined(parts: Iterable[Rows]) -> list[Rows]:
    joined: list[Rows] = []
    for begin, end in sorted(parts):
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined


# ── one rank's share ────────────────────────────────────────────────────────────────────────────────────────────────


class Pick(NamedTuple):
    """Of the structure's chunk ``chunk``, which lies at ``held``, the box that is written."""

    chunk: int
    held: Box
    box: Box


class Division:
    """What one rank writes of the chunks that it holds. Of what it was not asked about, it writes all."""

    def __init__(self, held: Holdings, rows: Sequence[Sequence[Rows]]) -> None:
        self._boxes: dict[tuple[TensorSpec, Box], list[Box]] = {}
        for (spec, box), parts in zip(held.chunks(), rows, strict=True):
            self._boxes[spec, box] = [_rows_of(box, part) for part in parts]

    def picks(self, structure: Structure) -> list[Pick]:
        """What this rank writes of a structure, in its order."""
        return [
            Pick(number, chunk.box, box)
            for number, chunk in enumerate(structure.chunks)
            for box in self._share(structure.tensors[chunk.tensor], chunk.box, structure.own)
        ]

    def _share(self, spec: TensorSpec, box: Box, own: frozenset[str]) -> Sequence[Box]:
        return (box,) if spec.name in own else self._boxes.get((spec, box), (box,))


def share(structure: Structure, picks: Sequence[Pick], rank: int) -> Structure:
    """The structure of what rank ``rank`` writes."""
    chunks = tuple(ChunkSpec(structure.chunks[pick.chunk].tensor, pick.box) for pick in picks)
    return replace(structure, chunks=chunks, rank=rank)


def _rows_of(box: Box, rows: Rows) -> Box:
    if not box.sizes:
        return box
    begin, end = rows
    return Box((box.offsets[0] + begin, *box.offsets[1:]), (end - begin, *box.sizes[1:]))
