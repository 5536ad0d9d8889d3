"""What each rank holds of a state, as it tells the rank that divides it; and the chunks of all ranks, as columns: which
of them are replicas of each other. A million take some seconds.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import msgspec

from asyncdcp.boxes import Box
from asyncdcp.metadata import DTYPE_SIZES
from asyncdcp.planning.save_plan import Structure, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints: TypeAlias = NDArray[np.int64]


class Holdings(msgspec.Struct):
    """What one rank holds of a state, without what is its own. Made by ``holdings_of``.

    ``spread`` says of each chunk whether any holder may write it. Replicas must have the same ``fingerprints``; an
    empty one is not compared. ``values`` are digests of plain values. ``save`` is the number of the next save that the
    rank plans.
    """

    packed: bytes
    """The tensors, encoded: most ranks have the same, so that they are decoded once."""
    tensor: bytes
    """Of each chunk the number of its tensor, as a signed integer of 8 bytes."""
    boxes: bytes
    """Of each chunk its offsets and then its sizes, as such integers."""
    spread: bytes
    fingerprints: list[bytes]
    values: dict[str, bytes]
    save: int = 0

    def tensors(self) -> list[TensorSpec]:
        """By number."""
        return msgspec.msgpack.decode(self.packed, type=list[TensorSpec])

    def chunks(self) -> Iterator[tuple[TensorSpec, Box]]:
        """In order of their numbers."""
        tensors, numbers = self.tensors(), iter(array("q", self.boxes))
        for tensor in array("q", self.tensor):
            spec = tensors[tensor]
            offsets = tuple(next(numbers) for _ in spec.shape)
            yield spec, Box(offsets, tuple(next(numbers) for _ in spec.shape))

    def unmarked(self) -> Holdings:
        """Without fingerprints and digests, which are of one moment."""
        return msgspec.structs.replace(self, fingerprints=[b""] * len(self.spread), values={})


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
    boxes = (chunk.box for _, chunk in chunks)
    return Holdings(
        packed=msgspec.msgpack.encode([structure.tensors[number] for number in shared]),
        tensor=array("q", [renumbered[chunk.tensor] for _, chunk in chunks]).tobytes(),
        boxes=array("q", chain.from_iterable((*box.offsets, *box.sizes) for box in boxes)).tobytes(),
        spread=bytes(spread(structure.tensors[chunk.tensor].name) for _, chunk in chunks),
        fingerprints=[fingerprints[number] for number, _ in chunks],
        values={name: digest for name, digest in values.items() if name not in structure.own},
    )


_SALTS = 8
"""So many times other hashes are tried where two different boxes have the same one."""


class Group(NamedTuple):
    """A box of a tensor that several hold: ``holders`` are ranks, each with the number that the chunk has there, in
    order, and ``ranks`` the same without the numbers. ``spread``: any of them may write it.
    """

    name: str
    rows: int
    nbytes: int
    spread: bool
    holders: list[tuple[int, int]]
    ranks: Ints


class HeldChunks:
    """All chunks of all ranks, rank by rank. ``nbytes`` counts each box once; ``faults`` say of tensors, by name, how
    they differ between ranks.
    """

    def __init__(self, holdings: Sequence[Holdings]) -> None:
        import numpy as np

        self._world_size = len(holdings)
        self._names: list[str] = []
        self.faults: dict[str, str] = {}
        counts = [len(held.spread) for held in holdings]
        self._starts = np.cumsum([0, *counts])
        self._rank = np.repeat(np.arange(len(holdings)), counts)
        tables = [*self._tables(holdings)]
        wide = max((table.shape[1] for table in tables), default=1)
        self._keys = np.concatenate([_widened(table, wide) for table in tables])
        self._spread = np.frombuffer(b"".join(held.spread for held in holdings), np.bool_)
        sizes = self._keys[:, 1 + wide // 2 :]
        self._rows = sizes[:, 0] if wide > 1 else np.ones(len(self._keys), np.int64)
        self._nbytes = sizes.prod(axis=1) * np.array(self._itemsizes, np.int64)[self._keys[:, 0]]

    def _tables(self, holdings: Sequence[Holdings]) -> Iterator[Ints]:
        """Of each rank its chunks: tensor, offsets, sizes; the tensors' numbers are those of their names."""
        import numpy as np

        known: dict[str, tuple[int, int, TensorSpec]] = {}
        self._itemsizes: list[int] = []
        alike: dict[bytes, tuple[Ints, Ints]] = {}
        for rank, held in enumerate(holdings):
            if held.packed not in alike:
                specs = held.tensors()
                for spec in specs:
                    self._add(spec, rank, known)
                numbers = np.array([known[spec.name][0] for spec in specs], np.int64)
                alike[held.packed] = numbers, np.array([len(spec.shape) for spec in specs], np.int64)
            numbers, ndims = alike[held.packed]
            yield _table(held, numbers, ndims)

    def _add(self, spec: TensorSpec, rank: int, known: dict[str, tuple[int, int, TensorSpec]]) -> None:
        number, lowest, first = known.setdefault(spec.name, (len(self._names), rank, spec))
        if number == len(self._names):
            self._names.append(spec.name)
            self._itemsizes.append(DTYPE_SIZES[spec.dtype])
        elif first != spec:
            fault = (
                f"{spec.name} is {first.dtype}{list(first.shape)} on rank {lowest}, "
                f"{spec.dtype}{list(spec.shape)} on rank {rank}"
            )
            self.faults.setdefault(spec.name, fault)

    @cached_property
    def _order(self) -> tuple[Ints, Ints]:
        """The chunks in an order that has the same boxes together, lowest rank first, and where each box begins."""
        import numpy as np

        for salt in range(_SALTS):
            hashes = _hashes(self._keys, salt)
            order = np.argsort(hashes, kind="stable")
            hashes = hashes[order]
            apart = np.flatnonzero(np.concatenate([np.ones(min(1, len(order)), np.bool_), hashes[1:] != hashes[:-1]]))
            first = np.repeat(order[apart], np.diff([*apart.tolist(), len(order)]))
            if np.array_equal(self._keys[order], self._keys[first]):
                return order, apart
        raise AssertionError("no hash tells the boxes apart")

    @property
    def nbytes(self) -> int:
        order, begins = self._order
        return int(self._nbytes[order[begins]].sum())

    def groups(self) -> list[Group]:
        """The boxes that are held more than once, in the order in which they first come."""
        import numpy as np

        order, begins = self._order
        ends = np.concatenate([begins[1:], [len(order)]])
        many = np.flatnonzero(ends - begins > 1)
        many = many[np.argsort(order[begins[many]])]
        ranks = self._rank[order]
        holders = list(zip(ranks.tolist(), (order - self._starts[ranks]).tolist(), strict=True))
        spread = np.logical_and.reduceat(self._spread[order], begins)[many] if len(order) else many
        first = order[begins[many]]
        columns = (self._keys[first, 0], self._rows[first], self._nbytes[first], spread, begins[many], ends[many])
        return [
            Group(self._names[tensor], rows, nbytes, free, holders[begin:end], ranks[begin:end])
            for tensor, rows, nbytes, free, begin, end in zip(*(each.tolist() for each in columns), strict=True)
        ]

    def whole_shares(self) -> list[list[list[tuple[int, int]]]]:
        """For each rank and each of its chunks all rows of it; lists that are alike may be one, not to be changed."""
        rows = self._rows.tolist()
        whole = {count: [(0, count)] for count in set(rows)}
        bounds = zip(self._starts[:-1].tolist(), self._starts[1:].tolist(), strict=True)
        return [[whole[count] for count in rows[begin:end]] for begin, end in bounds]

    def sole_loads(self) -> list[int]:
        """For each rank the bytes of the boxes that it alone holds."""
        import numpy as np

        order, begins = self._order
        sole = order[begins[np.diff([*begins.tolist(), len(order)]) == 1]]
        loads = np.zeros(self._world_size, np.int64)
        np.add.at(loads, self._rank[sole], self._nbytes[sole])
        found: list[int] = loads.tolist()
        return found


def _table(held: Holdings, numbers: Ints, ndims: Ints) -> Ints:
    """A row for each chunk: the number of its tensor among all, offsets, sizes; of fewer dimensions than the most, with
    offsets of 0 and sizes of 1.
    """
    import numpy as np

    tensor = np.frombuffer(held.tensor, np.int64)
    flat = np.frombuffer(held.boxes, np.int64)
    own = ndims[tensor]
    wide = int(own.max(initial=0))
    table = np.zeros((len(tensor), 1 + 2 * wide), np.int64)
    table[:, 0] = numbers[tensor]
    table[:, 1 + wide :] = 1
    begins = np.cumsum(2 * own) - 2 * own
    for ndim in range(1, wide + 1):
        of = np.flatnonzero(own == ndim)
        boxes = flat[begins[of, None] + np.arange(2 * ndim)]
        table[of, 1 : 1 + ndim] = boxes[:, :ndim]
        table[of, 1 + wide : 1 + wide + ndim] = boxes[:, ndim:]
    return table


def _widened(table: Ints, width: int) -> Ints:
    """The same with more dimensions."""
    import numpy as np

    if table.shape[1] == width:
        return table
    ndim, wide = table.shape[1] // 2, width // 2
    wider = np.zeros((len(table), width), np.int64)
    wider[:, : 1 + ndim] = table[:, : 1 + ndim]
    wider[:, 1 + wide :] = 1
    wider[:, 1 + wide : 1 + wide + ndim] = table[:, 1 + ndim :]
    return wider


def _hashes(keys: Ints, salt: int) -> NDArray[np.uint64]:
    """A number for each row; the multiplications wrap around."""
    import numpy as np

    factors = np.random.default_rng(salt).integers(1, 1 << 63, keys.shape[1], np.uint64) | np.uint64(1)
    mixed: NDArray[np.uint64] = (keys.view(np.uint64) * factors).sum(axis=1, dtype=np.uint64)
    return mixed
