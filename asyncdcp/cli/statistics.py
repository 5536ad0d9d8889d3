"""Statistics of tensors in one pass over verified bytes, in little memory: pieces are measured as they come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from anyio import to_thread

from asyncdcp.cli.entries import Entry
from asyncdcp.cli.output import shown_progress
from asyncdcp.cli.reading import Array, batches, is_number, numbers, pieces, read_pieces, stored
from asyncdcp.cli.text import number_text
from asyncdcp.metadata import DTYPE_SIZES
from asyncdcp.pipeline.formats import ReadableCheckpoint

FIRST = 4
"""So many values are shown."""


class Statistics:
    """Of one tensor's elements, added piece by piece.

    ``minimum``, ``maximum``, ``mean`` and ``std`` (of the population, in double precision) are of the finite ones; for
    complex numbers of their absolute values.
    """

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._squares = 0.0
        self.count = self.nans = self.infinite = self.zeros = 0
        self.minimum, self.maximum = math.inf, -math.inf
        self.mean = 0.0
        self.first: list[float | complex] = []

    @property
    def finite(self) -> int:
        return self.count - self.nans - self.infinite

    @property
    def std(self) -> float:
        return math.sqrt(self._squares / self.finite) if self.finite else math.nan

    def add(self, elements: Array) -> None:
        """Adds elements, as they are stored."""
        values = numbers(elements.reshape(-1), self._dtype)
        if not self.count:
            self.first = values[:FIRST].tolist()
        self.count += values.size
        self.zeros += values.size - int(np.count_nonzero(values))
        if values.dtype.kind in "fc":
            nans, infinite = int(np.count_nonzero(np.isnan(values))), int(np.count_nonzero(np.isinf(values)))
            if nans or infinite:
                self.nans, self.infinite = self.nans + nans, self.infinite + infinite
                values = values[np.isfinite(values)]
        if values.size:
            with np.errstate(all="ignore"):  # numbers near the greatest give inf, which is what there is to show
                self._merge((np.abs(values) if values.dtype.kind == "c" else values).astype("f8"))

    def _merge(self, wide: Array) -> None:
        """Chan's formula: means and squares of two parts that are of the same size in neither sense."""
        added, before = wide.size, self.finite - wide.size
        mean = float(wide.mean())
        self.minimum = min(self.minimum, float(wide.min()))
        self.maximum = max(self.maximum, float(wide.max()))
        apart = mean - self.mean
        self.mean += apart * added / (before + added)
        wide -= mean
        self._squares += float(np.dot(wide, wide)) + apart * apart * before * added / (before + added)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        known = self.finite > 0
        return {
            "min": self.minimum if known else None,
            "max": self.maximum if known else None,
            "mean": self.mean if known else None,
            "std": self.std if known else None,
            "zeros": self.zeros,
            "nan": self.nans,
            "inf": self.infinite,
            "first": [[value.real, value.imag] if isinstance(value, complex) else value for value in self.first],
        }

    def cells(self, entry: Entry) -> tuple[str, ...]:
        """A row of the table, without the name."""
        numbers = (self.minimum, self.maximum, self.mean, self.std) if self.finite else ()
        texts = [number_text(value) for value in numbers] or ["", "", "", ""]
        first = ", ".join(map(number_text, self.first))
        more = ", …" if self.first and self.count > len(self.first) else ""
        return (entry.dtype, str(list(entry.shape)), *texts, self._beware(), first + more)

    def _beware(self) -> str:
        if not self.count:
            return "empty"
        found = [f"{count:,} {what}" for count, what in ((self.nans, "nan"), (self.infinite, "inf")) if count]
        if self.zeros == self.count:
            found.append("all zero")
        elif self.finite > 1 and self.minimum == self.maximum:
            found.append("all equal")
        if not is_number(self._dtype):
            found.append("stored bytes")
        return ", ".join(found)


async def measure(reader: ReadableCheckpoint, entries: Sequence[Entry]) -> list[tuple[Entry, Statistics]]:
    """The statistics of each entry; every byte is read once and verified."""
    found = {entry.stored_name: Statistics(entry.dtype) for entry in entries}
    sizes = {name: DTYPE_SIZES[stored(reader, name).properties.dtype] for name in found}
    parts = (piece for name, size in sizes.items() for piece in pieces(name, stored(reader, name).size, size))
    with shown_progress("reading", sum({entry.stored_name: entry.size for entry in entries}.values())) as trace:
        for batch in batches(parts, sizes):
            arrays = await read_pieces(reader, batch, trace)
            for piece, array in zip(batch, arrays, strict=True):
                await to_thread.run_sync(found[piece.name].add, array)
    return [(entry, found[entry.stored_name]) for entry in entries]
