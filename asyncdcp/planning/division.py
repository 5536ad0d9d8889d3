"""Who writes what: the chunks that several ranks hold are divided among them, once for a structure and for all ranks.

A chunk that one rank alone holds is that rank's to write. Replicas that may be spread go to their holders by bytes, the
largest first, each to the one that has the least; what is too large for an even division is cut along its first
dimension. Other replicas come from their lowest holder, all of them, so that what belongs together stays so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import msgspec

from asyncdcp.boxes import Box
from asyncdcp.errors import ReplicaMismatch
from asyncdcp.metadata import DTYPE_SIZES
from asyncdcp.planning.save_plan import ChunkSpec, Structure, TensorSpec

PART_BYTES = 64 << 10
"""Replicas are not cut into parts smaller than this."""
_UNEVEN = 0.05
"""Parts are this small a part of what a rank has to write on average, so that sums come out even."""
_SHOWN = 5

Rows: TypeAlias = tuple[int, int]
"""First and one past the last row of a chunk; a chunk without dimensions has one."""


class Holdings(msgspec.Struct):
    """What one rank holds of a state, without what is its own. Columns: chunk ``n`` is ``offsets[n]``, ``sizes[n]`` of
    tensor ``tensor[n]``.

    ``spread`` says which may be written by any holder. Replicas must have the same ``fingerprints``; an empty one is
    not compared. ``values`` are digests of plain values. ``save`` is the number of the next save that the rank plans.
    """

    tensors: list[TensorSpec]
    tensor: list[int]
    offsets: list[tuple[int, ...]]
    sizes: list[tuple[int, ...]]
    spread: list[bool]
    fingerprints: list[bytes]
    values: dict[str, bytes]
    save: int = 0


class Shares(msgspec.Struct):
    """For each rank and each of its chunks the rows that it is to write. Good from save number ``begin`` on."""

    rows: list[list[list[Rows]]]
    begin: int


class _Group(NamedTuple):
    """One box of a tensor, and the ranks that hold it, each with the number that it has there."""

    spec: TensorSpec
    box: Box
    holders: list[tuple[int, int]]

    @property
    def nbytes(self) -> int:
        return self.box.volume * DTYPE_SIZES[self.spec.dtype]

    @property
    def rows(self) -> int:
        return self.box.sizes[0] if self.box.sizes else 1


def divide(holdings: Sequence[Holdings]) -> Shares:
    """Each rank's share. ``ReplicaMismatch`` lists what has one name and is not the same on all ranks."""
    groups = _groups(holdings)
    _check_values(holdings)
    shares: list[list[list[Rows]]] = [[[] for _ in held.tensor] for held in holdings]
    loads = [0] * len(holdings)
    spread: list[_Group] = []
    for group in groups:
        rank, number = group.holders[0]
        if len(group.holders) > 1 and all(holdings[rank].spread[number] for rank, number in group.holders):
            spread.append(group)
        else:
            shares[rank][number].append((0, group.rows))
            loads[rank] += group.nbytes
    limit = max(PART_BYTES, int(_UNEVEN * sum(group.nbytes for group in groups) / len(holdings)))
    parts = [(part, group) for group in spread for part in _parts(group, limit)]
    parts.sort(key=lambda item: -_part_bytes(*item))
    for part, group in parts:
        rank, number = min(group.holders, key=lambda holder: loads[holder[0]])
        shares[rank][number].append(part)
        loads[rank] += _part_bytes(part, group)
    return Shares([[_joined(rows) for rows in share] for share in shares], max(held.save for held in holdings))


def _groups(holdings: Sequence[Holdings]) -> list[_Group]:
    first: dict[str, tuple[int, TensorSpec]] = {}
    found: dict[tuple[str, Box], _Group] = {}
    faults: dict[str, str] = {}
    for rank, held in enumerate(holdings):
        for spec in held.tensors:
            lowest, known = first.setdefault(spec.name, (rank, spec))
            if known != spec:
                faults.setdefault(
                    spec.name,
                    f"{spec.name} is {known.dtype}{list(known.shape)} on rank {lowest}, "
                    f"{spec.dtype}{list(spec.shape)} on rank {rank}",
                )
        for number, (tensor, offsets, sizes) in enumerate(zip(held.tensor, held.offsets, held.sizes, strict=True)):
            spec, box = held.tensors[tensor], Box(offsets, sizes)
            group = found.setdefault((spec.name, box), _Group(spec, box, []))
            group.holders.append((rank, number))
    for group in found.values():
        odd = _odd_one(group, holdings)
        if odd is not None:
            name, lowest = group.spec.name, group.holders[0][0]
            faults.setdefault(name, f"{name} has another content on rank {odd} than on rank {lowest}")
    _refuse(faults)
    return list(found.values())


def _odd_one(group: _Group, holdings: Sequence[Holdings]) -> int | None:
    """A rank whose replica differs from the lowest one's."""
    seen = b""
    for rank, number in group.holders:
        mark = holdings[rank].fingerprints[number]
        seen = seen or mark
        if mark and mark != seen:
            return rank
    return None


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


def _parts(group: _Group, limit: int) -> Iterator[Rows]:
    count = min(group.rows, -(-group.nbytes // limit), 8 * len(group.holders)) or 1
    for number in range(count):
        yield group.rows * number // count, group.rows * (number + 1) // count


def _part_bytes(part: Rows, group: _Group) -> int:
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
        for tensor, offsets, sizes, parts in zip(held.tensor, held.offsets, held.sizes, rows, strict=True):
            box = Box(offsets, sizes)
            self._boxes[held.tensors[tensor], box] = [_rows_of(box, part) for part in parts]

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


def holdings_of(
    structure: Structure, spread: Callable[[str], bool], fingerprints: Sequence[bytes], values: dict[str, bytes]
) -> Holdings:
    """What a structure's rank holds, without what is its own."""
    chunks = [
        (number, chunk)
        for number, chunk in enumerate(structure.chunks)
        if structure.tensors[chunk.tensor].name not in structure.own and chunk.box.volume
    ]
    shared = [number for number, spec in enumerate(structure.tensors) if spec.name not in structure.own]
    renumbered = {number: place for place, number in enumerate(shared)}
    return Holdings(
        tensors=[structure.tensors[number] for number in shared],
        tensor=[renumbered[chunk.tensor] for _, chunk in chunks],
        offsets=[chunk.box.offsets for _, chunk in chunks],
        sizes=[chunk.box.sizes for _, chunk in chunks],
        spread=[spread(structure.tensors[chunk.tensor].name) for _, chunk in chunks],
        fingerprints=[fingerprints[number] for number, _ in chunks],
        values={name: digest for name, digest in values.items() if name not in structure.own},
    )


def _rows_of(box: Box, rows: Rows) -> Box:
    if not box.sizes:
        return box
    begin, end = rows
    return Box((box.offsets[0] + begin, *box.offsets[1:]), (end - begin, *box.sizes[1:]))
