"""Which boxes of a whole tensor a rank of a device mesh holds. The arithmetic of torch's placements, without torch.

Shards are cut as ``torch.chunk`` cuts: the first ones have ``ceil(size / shards)`` elements, the last ones less or
none. A strided split (FSDP2 over tensor parallelism, torch's ``_StridedShard``) first cuts into ``factor`` pieces, each
of these into the shards, and takes one shard of every piece; what a rank holds then need not be consecutive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

from asyncdcp.boxes import Box


class Split(NamedTuple):
    """A cut of dimension ``dim`` into ``shards`` shards, of which number ``kept`` is here."""

    dim: int
    shards: int
    kept: int
    factor: int = 1


class Run(NamedTuple):
    """``length`` consecutive positions of a dimension, from ``start`` on."""

    start: int
    length: int


class HeldBox(NamedTuple):
    """A box of the whole tensor, and where it lies in the local one: ``local`` has the same sizes."""

    box: Box
    local: Box


def held_boxes(shape: Sequence[int], splits: Iterable[Split]) -> list[HeldBox]:
    """The boxes of a tensor of ``shape`` that are left of it after ``splits``, in turn; none where nothing is left.

    Together the local boxes tile the local tensor, whose shape is ``local_shape``.
    """
    dimensions = [list(_with_local_starts(runs)) for runs in _kept(shape, splits)]
    return [
        HeldBox(
            Box(tuple(run.start for run, _ in combination), tuple(run.length for run, _ in combination)),
            Box(tuple(start for _, start in combination), tuple(run.length for run, _ in combination)),
        )
        for combination in product(*dimensions)
    ]


def local_shape(shape: Sequence[int], splits: Iterable[Split]) -> tuple[int, ...]:
    """The shape of what is left of a tensor after ``splits``."""
    return tuple(sum(run.length for run in runs) for runs in _kept(shape, splits))


def _kept(shape: Sequence[int], splits: Iterable[Split]) -> list[list[Run]]:
    kept = [[Run(0, size)] for size in shape]
    for split in splits:
        runs = kept[split.dim]
        size = sum(run.length for run in runs)
        kept[split.dim] = [run for begin, end in _shards(size, split) for run in _slice(runs, begin, end)]
    return [_joined(runs) if size else runs for runs, size in zip(kept, shape, strict=True)]


def _shards(size: int, split: Split) -> list[tuple[int, int]]:
    """The parts of ``size`` local positions that are kept."""
    piece = -(-size // split.factor)
    parts = []
    for begin in range(0, size, piece or 1):
        length = min(piece, size - begin)
        shard = -(-length // split.shards)
        parts.append((begin + min(shard * split.kept, length), begin + min(shard * (split.kept + 1), length)))
    return parts


def _slice(runs: Sequence[Run], begin: int, end: int) -> list[Run]:
    """Local positions ``begin <= i < end`` of what ``runs`` are, as runs."""
    found, position = [], 0
    for run in runs:
        first, last = max(begin, position), min(end, position + run.length)
        if first < last:
            found.append(Run(run.start + first - position, last - first))
        position += run.length
    return found


def _joined(runs: Sequence[Run]) -> list[Run]:
    joined: list[Run] = []
    for run in runs:
        last = joined[-1] if joined else None
        if last is not None and last.start + last.length == run.start:
            joined[-1] = Run(last.start, last.length + run.length)
        else:
            joined.append(run)
    return joined


def _with_local_starts(runs: Sequence[Run]) -> Iterable[tuple[Run, int]]:
    position = 0
    for run in runs:
        yield run, position
        position += run.length
