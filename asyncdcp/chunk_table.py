"""Chunks as columns: those of a checkpoint of many ranks are checked and found without an object for each.

``chunk_rows`` turns an Index's columns into arrays if every number in them can be right. A ``ChunkTable`` has all
ranks' rows, sorted by tensor; it knows whether they cover every tensor exactly, and which of them meet a box. What a
reader sees of it is in ``stored_chunks.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import msgspec

from asyncdcp.boxes import Box, tiles, whole
from asyncdcp.metadata import DTYPE_SIZES, ChunkColumns, ChunkLocation, IndexPlan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints: TypeAlias = NDArray[np.int64]
    Bools: TypeAlias = NDArray[np.bool_]


_NONE, _SEVERAL = -1, -2


class Listing(NamedTuple):
    """The list of tensors of an Index as columns. ``first`` is where a tensor's extents begin in ``extents``."""

    ndims: Ints
    first: Ints
    extents: Ints
    itemsizes: Ints


class Rows(NamedTuple):
    """Chunks: the tensor's number, offsets and sizes (flat), and bytes."""

    tensor: Ints
    offsets: Ints
    sizes: Ints
    length: Ints

    def only(self, kept: Bools, ndims: Ints) -> Rows:
        """Some of them; ``ndims`` are those of each row's tensor."""
        if kept.all():
            return self
        flat = kept.repeat(ndims)
        return Rows(self.tensor[kept], self.offsets[flat], self.sizes[flat], self.length[kept])


def listing_of(plan: IndexPlan) -> Listing:
    """The columns of a list that is sound."""
    ndims = _array([len(shape) for shape in plan.shapes])
    extents = _array([extent for shape in plan.shapes for extent in shape])
    return Listing(ndims, _starts(ndims), extents, _array([DTYPE_SIZES[dtype] for dtype in plan.dtypes]))


def chunk_rows(columns: ChunkColumns, listing: Listing) -> Rows | None:
    """The chunks, each of a listed tensor and within its shape; None if that cannot be said of all."""
    import numpy as np

    try:
        tensor, offsets, sizes = _array(columns.tensor), _array(columns.offsets), _array(columns.sizes)
    except OverflowError:
        return None
    if tensor.size and not 0 <= tensor.min() <= tensor.max() < listing.ndims.size:
        return None
    ndims = listing.ndims[tensor]
    if not offsets.size == sizes.size == ndims.sum():
        return None
    extents = listing.extents[_spans(listing.first[tensor], ndims)]
    if (offsets < 0).any() or (sizes < 0).any() or (sizes > extents).any() or (offsets > extents - sizes).any():
        return None
    starts, length = _starts(ndims), listing.itemsizes[tensor]
    for dim in range(int(ndims.max(initial=0))):
        having = np.flatnonzero(ndims > dim)
        length[having] *= sizes[starts[having] + dim]
    return Rows(tensor, offsets, sizes, length)


class StoredTensor(msgspec.Struct, frozen=True, gc=False):
    """A tensor as the lowest rank that lists it says, in the Index of name ``source``. One that is not ``shown`` is
    another rank's own.
    """

    name: str
    source: str
    dtype: str
    shape: tuple[int, ...]
    shown: bool = True

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return prod(self.shape) * DTYPE_SIZES[self.dtype]


class ChunkTable:
    """All chunks of ``tensors``, without empty ones, by tensor, then in the order in which they were given.

    Each of ``parts`` has rows whose ``tensor`` counts in ``tensors``, and for each row the number in ``files`` and the
    first byte there. Of chunks that are just the same the first counts, once ``fault`` has been asked.
    """

    def __init__(self, tensors: Sequence[StoredTensor], files: Sequence[str], parts: Sequence[tuple[Rows, Ints, Ints]]):
        import numpy as np

        self.tensors = tensors
        self._files = files
        self._ndims = _array([len(tensor.shape) for tensor in tensors])
        self._extents = _array([extent for tensor in tensors for extent in tensor.shape])
        given = [np.concatenate([part[n] for part, _, _ in parts]) if parts else _array([]) for n in range(4)]
        files_, begins = (np.concatenate([part[n] for part in parts]) if parts else _array([]) for n in (1, 2))
        short = given[0].astype(np.uint16) if len(tensors) <= 1 << 16 else given[0]  # which sorts by radix
        order = short.argsort(kind="stable")
        self._tensor, self._length = given[0][order], given[3][order]
        self._file, self._begin = files_[order], begins[order]
        ndims = self._ndims[given[0]]
        flat = _spans(_starts(ndims)[order], ndims[order])
        self._offsets, self._sizes = given[1][flat], given[2][flat]
        self._kept = np.ones(order.size, np.bool_)
        self._locate()

    def _locate(self) -> None:
        import numpy as np

        self._rows = np.searchsorted(self._tensor, np.arange(len(self.tensors) + 1))
        self._flat: Ints = np.append(_starts(self._ndims[self._tensor]), self._offsets.size)

    def fault(self) -> tuple[int, str] | None:
        """The first tensor that its chunks do not cover exactly, and what they do instead."""
        import numpy as np

        cut, bad = self._cuts()
        bad |= self._badly_cut(cut)
        for number in np.flatnonzero(cut == _SEVERAL).tolist():
            bad[number] = not self._tiled(number)
        faults = np.flatnonzero(bad)
        if faults.size:
            return int(faults[0]), self._what(int(faults[0]))
        if not self._kept.all():
            rows = Rows(self._tensor, self._offsets, self._sizes, self._length)
            rows = rows.only(self._kept, self._ndims[self._tensor])
            self._tensor, self._offsets, self._sizes, self._length = rows
            self._file, self._begin = self._file[self._kept], self._begin[self._kept]
            self._kept = self._kept[self._kept]
            self._locate()
        return None

    def _cuts(self) -> tuple[Ints, Bools]:
        """For each tensor the dimension that it is cut in, counted over all tensors: ``_NONE`` if it is whole in every
        chunk, ``_SEVERAL`` if there are several. And whether it has no chunk although it is not empty.
        """
        import numpy as np

        first = _starts(self._ndims)
        dims = _spans(first[self._tensor], self._ndims[self._tensor])
        touched = np.zeros(self._extents.size, np.bool_)
        touched[dims[(self._offsets != 0) | (self._sizes != self._extents[dims])]] = True
        owner = np.arange(len(self.tensors)).repeat(self._ndims)[touched]
        cut = np.full(len(self.tensors), _NONE)
        cut[owner] = np.flatnonzero(touched)
        cut[np.bincount(owner, minlength=len(self.tensors)) > 1] = _SEVERAL
        filled = _array([prod(tensor.shape) for tensor in self.tensors]) > 0
        return cut, filled & (self._rows[1:] == self._rows[:-1])

    def _badly_cut(self, cut: Ints) -> Bools:
        """Which tensors that are cut in one dimension at most are not covered by chunks that follow each other in it.
        Repeated chunks are dropped.
        """
        import numpy as np

        bad = np.zeros(len(self.tensors), np.bool_)
        rows = np.flatnonzero(cut[self._tensor] != _SEVERAL)
        tensor = self._tensor[rows]
        start, size, extent = np.zeros_like(rows), np.ones_like(rows), np.ones_like(rows)
        is_cut = cut[tensor] != _NONE
        dims = cut[tensor[is_cut]]
        place = self._flat[rows[is_cut]] + dims - _starts(self._ndims)[tensor[is_cut]]
        start[is_cut], size[is_cut], extent[is_cut] = self._offsets[place], self._sizes[place], self._extents[dims]
        if not _ascending(tensor, start, size):
            order = np.lexsort((size, start, tensor))  # stable, so that of equal ones the lowest rank's comes first
            rows, tensor, start, size, extent = (column[order] for column in (rows, tensor, start, size, extent))
        repeated = np.zeros(rows.size, np.bool_)
        repeated[1:] = (tensor[1:] == tensor[:-1]) & (start[1:] == start[:-1]) & (size[1:] == size[:-1])
        self._kept[rows[repeated]] = False
        tensor, start, size, extent = (column[~repeated] for column in (tensor, start, size, extent))
        leads = np.ones(tensor.size + 1, np.bool_)
        leads[1:-1] = tensor[1:] != tensor[:-1]
        end = start + size
        due = np.append(0, end[:-1])
        due[leads[:-1]] = 0
        bad[tensor[(start != due) | (leads[1:] & (end != extent))]] = True
        return bad

    def _tiled(self, number: int) -> bool:
        """Whether a tensor's chunks cover it, however they lie. Repeated ones are dropped."""
        distinct: dict[Box, int] = {}
        for row, box in enumerate(self.boxes(number), int(self._rows[number])):
            self._kept[row] = distinct.setdefault(box, row) == row
        return tiles(whole(self.tensors[number].shape), distinct)

    def _what(self, number: int) -> str:
        held = sum(box.volume for box in dict.fromkeys(self.boxes(number)))
        return "leave a hole in it" if held < prod(self.tensors[number].shape) else "overlap"

    def __len__(self) -> int:
        return self._tensor.size

    def count(self, number: int) -> int:
        """The chunks of a tensor."""
        return int(self._rows[number + 1] - self._rows[number])

    def boxes(self, number: int) -> list[Box]:
        """The chunks of a tensor."""
        offsets, sizes = self._coordinates(number)
        return list(map(Box, map(tuple, offsets.tolist()), map(tuple, sizes.tolist())))

    def location(self, number: int, chunk: int) -> ChunkLocation:
        """Where a chunk of a tensor is."""
        row = self._rows[number] + chunk
        return ChunkLocation(self._files[self._file[row]], int(self._begin[row]), int(self._length[row]))

    def meeting(self, number: int, box: Box) -> Iterator[tuple[Box, ChunkLocation]]:
        """The chunks of a tensor that share a point with ``box``."""
        import numpy as np

        if not box.volume:
            return
        if self.count(number) == 1:  # then it is all of the tensor
            yield whole(self.tensors[number].shape), self.location(number, 0)
            return
        offsets, sizes = self._coordinates(number)
        starts, extents = _array(box.offsets), _array(box.sizes)
        common = np.minimum(offsets + sizes, starts + extents) > np.maximum(offsets, starts)
        for chunk in np.flatnonzero(common.all(axis=1)).tolist():
            found = Box(tuple(offsets[chunk].tolist()), tuple(sizes[chunk].tolist()))
            yield found, self.location(number, chunk)

    def _coordinates(self, number: int) -> tuple[Ints, Ints]:
        first, last = self._rows[number], self._rows[number + 1]
        shape = (int(last - first), len(self.tensors[number].shape))
        flat = slice(self._flat[first], self._flat[last])
        return self._offsets[flat].reshape(shape), self._sizes[flat].reshape(shape)


def _array(values: Sequence[int]) -> Ints:
    """OverflowError where one does not fit."""
    import numpy as np

    return np.array(values, np.int64)


def _starts(counts: Ints) -> Ints:
    """Where each of so many begins, one after another."""
    return counts.cumsum() - counts


def _spans(starts: Ints, counts: Ints) -> Ints:
    """``starts[n]`` and what follows it, ``counts[n]`` numbers for each n."""
    import numpy as np

    return np.arange(int(counts.sum())) + (starts - _starts(counts)).repeat(counts)


def _ascending(*keys: Ints) -> bool:
    """Whether rows are sorted by ``keys``, the first one first."""
    import numpy as np

    equal = np.ones(max(keys[0].size - 1, 0), np.bool_)
    for key in keys:
        if (equal & (key[1:] < key[:-1])).any():
            return False
        equal &= key[1:] == key[:-1]
    return True
