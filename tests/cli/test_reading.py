"""Pieces of tensors come out right, however they were sharded and however they are cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdcp.boxes import Box
from asyncdcp.cli import reading
from asyncdcp.cli.reading import Piece, batches, pieces, read_pieces
from asyncdcp.metadata import (
    ChunkLocation,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from asyncdcp.pipeline.windows import ReadRange
from asyncdcp.trace import Trace
from tests.pipeline.forge import steady


class Sharded:
    """A checkpoint of one tensor in memory, cut along rows and columns, every chunk in a file of its own."""

    def __init__(self, array: np.ndarray, rows: list[int], columns: list[int]) -> None:
        self._files: dict[str, bytes] = {}
        places, chunks = {}, []
        for top, bottom in zip([0, *rows], [*rows, array.shape[0]], strict=True):
            for left, right in zip([0, *columns], [*columns, array.shape[1]], strict=True):
                part = array[top:bottom, left:right]
                name = f"{top}-{left}"
                self._files[name] = b"before" + part.tobytes()
                chunks.append(ChunkStorageMetadata((top, left), part.shape))
                places[MetadataIndex("x", (top, left))] = ChunkLocation(name, 6, part.nbytes)
        tensor = TensorStorageMetadata(TensorProperties(str(array.dtype)), array.shape, tuple(chunks))
        self.metadata: Any = Metadata({"x": tensor}, places, None, {}, None, {})  # type: ignore[arg-type]  # not read

    async def read(self, ranges: Sequence[ReadRange], trace: Trace) -> None:
        for each in ranges:
            assert each.into is not None
            each.into[:] = self._files[each.file][each.begin : each.end]

    async def aclose(self) -> None:
        pass


def _cuts(limit: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, limit - 1), unique=True, max_size=3).map(sorted) if limit > 1 else st.just([])


@steady
@given(st.data())
async def test_any_rows_of_any_sharding(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    array = np.arange(np.prod(shape), dtype="int16").reshape(shape)
    stored = Sharded(array, data.draw(_cuts(shape[0])), data.draw(_cuts(shape[1])))
    begin = data.draw(st.integers(0, shape[0] - 1))
    size = data.draw(st.integers(1, shape[0] - begin))
    (found,) = await read_pieces(stored, [Piece("x", Box((begin, 0), (size, shape[1])))], Trace())
    np.testing.assert_array_equal(found, array[begin : begin + size])


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 0), (7, 2), (1, 9), (4, 3, 2)])
def test_pieces_cover_a_tensor_once(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BATCH_BYTES", 16)
    found = [*pieces("x", shape, 4)]
    assert sum(piece.box.volume for piece in found) == np.prod(shape)
    assert all(piece.box.sizes[1:] == shape[1:] for piece in found)
    assert (
        [piece.box.offsets[0] for piece in found] == sorted({piece.box.offsets[0] for piece in found}) if shape else 1
    )
    for batch in batches(iter(found), {"x": 4}):
        assert len(batch) == 1 or sum(piece.box.volume * 4 for piece in batch) <= 16
