"""How far tensors moved from one checkpoint to another, in one pass over both and in little memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from anyio import to_thread

from asyncdcp.cli.entries import Entry
from asyncdcp.cli.output import shown_progress
from asyncdcp.cli.reading import Array, batches, is_number, numbers, pieces, read_pieces
from asyncdcp.cli.text import number_text
from asyncdcp.metadata import DTYPE_SIZES
from asyncdcp.pipeline.formats import ReadableCheckpoint


class Move:
    """What became of one tensor, added piece by piece. Sums are in double precision.

    Elements count as ``changed`` if their values differ (a nan is the same as a nan); only finite ones count for the
    distance. Where numbers have no meaning, as for packed bits, there is no distance.
    """

    def __init__(self, a: Entry, b: Entry) -> None:
        self.name = a.name
        self._dtypes = (a.dtype, b.dtype)
        self._shape = a.shape
        self._squares = self._length = self._sum = 0.0
        self.size = a.size + b.size
        self.count = self.changed = self.broken = 0
        self.greatest = 0.0

    @property
    def relative(self) -> float | None:
        """‖a-b‖ / ‖a‖; None where ‖a‖ is 0, or there is no distance."""
        if not self._length or not self._has_distance:
            return None
        return math.sqrt(self._squares) / math.sqrt(self._length)

    @property
    def order(self) -> float:
        """What lists are sorted by: what broke first, then how far it moved."""
        return math.inf if self.broken or self.relative is None else self.relative

    @property
    def _has_distance(self) -> bool:
        return all(map(is_number, self._dtypes))

    def add(self, a: Array, b: Array) -> None:
        """Adds elements, as they are stored."""
        ours, theirs = (numbers(part, dtype) for part, dtype in zip((a, b), self._dtypes, strict=True))
        self.count += ours.size
        different = ours != theirs
        if ours.dtype.kind in "fc" and theirs.dtype.kind in "fc":
            different &= ~(np.isnan(ours) & np.isnan(theirs))
        self.changed += int(np.count_nonzero(different))
        if ours.size and self._has_distance:
            with np.errstate(all="ignore"):
                self._measure(_wide(ours), _wide(theirs))

    def _measure(self, ours: Array, theirs: Array) -> None:
        finite = np.isfinite(ours) & np.isfinite(theirs)
        if not finite.all():
            self.broken += int(np.count_nonzero(np.isfinite(ours) & ~np.isfinite(theirs)))
            ours, theirs = ours[finite], theirs[finite]
        apart = np.abs(theirs - ours)
        size = np.abs(ours)
        self._length += float(np.vdot(size, size))
        self._squares += float(np.vdot(apart, apart))
        self._sum += float(apart.sum())
        self.greatest = max(self.greatest, float(apart.max(initial=0.0)))

    def cells(self) -> tuple[str, ...]:
        """A row of the table, without the name."""
        changed = f"{100 * self.changed / self.count:.3g} %"
        beware = f"{self.broken:,} became nan or inf" if self.broken else ""
        if not self._has_distance:
            return (str(list(self._shape)), "", "", "", changed, "stored bytes")
        moved = "from 0" if self.relative is None else f"{100 * self.relative:.3g} %"
        return (
            str(list(self._shape)),
            moved,
            number_text(self._sum / self.count),
            number_text(self.greatest),
            changed,
            beware,
        )

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        known = self._has_distance and self.count > 0
        return {
            "name": self.name,
            "elements": self.count,
            "changed": self.changed,
            "relative": self.relative,
            "mean": self._sum / self.count if known else None,
            "max": self.greatest if known else None,
            "became_not_finite": self.broken,
        }


def _wide(values: Array) -> Array:
    return values.astype("c16" if values.dtype.kind == "c" else "f8")


async def measure_moves(
    a: ReadableCheckpoint, b: ReadableCheckpoint, ours: Sequence[Entry], theirs: Sequence[Entry]
) -> list[Move]:
    """Compares the tensors that both have under the same name, in the same shape. Tied ones are compared once."""
    others = {entry.name: entry for entry in theirs}
    pairs = [
        (entry, others[entry.name])
        for entry in ours
        if entry.is_tensor and entry.alias_of is None and entry.name in others and others[entry.name].is_tensor
    ]
    moves = {x.name: Move(x, y) for x, y in pairs if x.shape == y.shape}
    partners = {x.name: y.stored_name for x, y in pairs}
    sizes = {x.name: max(DTYPE_SIZES[x.dtype], DTYPE_SIZES[y.dtype]) for x, y in pairs}
    parts = (piece for x, _ in pairs if x.name in moves for piece in pieces(x.name, x.shape, sizes[x.name]))
    with shown_progress("comparing", sum(move.size for move in moves.values())) as trace:
        for batch in batches(parts, sizes):
            left = await read_pieces(a, batch, trace)
            right = await read_pieces(b, [part._replace(name=partners[part.name]) for part in batch], trace)
            for piece, x, y in zip(batch, left, right, strict=True):
                await to_thread.run_sync(moves[piece.name].add, x, y)
    return list(moves.values())
