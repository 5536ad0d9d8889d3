"""Elements without torch are what torch says they are; statistics and moves are numpy's, however pieces are cut."""

from __future__ import annotations

import math
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncdcp.cli.commands.cat import _every_line
from asyncdcp.cli.entries import Entry
from asyncdcp.cli.moves import Move
from asyncdcp.cli.reading import is_number, numbers, stored_dtype
from asyncdcp.cli.statistics import Statistics
from asyncdcp.metadata import DTYPE_SIZES
from asyncdcp.state_dict.structure import DTYPES
from tests.pipeline.forge import steady

_COMPARED = sorted(name for name in DTYPES if is_number(name))


def _codes(itemsize: int) -> np.ndarray:
    """Every pattern of one or two bytes; of longer elements a sample with every kind of number in it."""
    if itemsize <= 2:
        return np.arange(1 << (8 * itemsize), dtype=f"<u{itemsize}")
    return np.random.default_rng(0).integers(0, 256, 4096 * itemsize, np.uint8)


@pytest.mark.parametrize("dtype", _COMPARED)
def test_every_element_is_torchs(dtype: str) -> None:
    codes = _codes(DTYPE_SIZES[dtype])
    if dtype == "bool":
        codes = codes[:2]
    raw = np.frombuffer(codes.tobytes(), np.uint8)
    theirs = torch.from_numpy(raw.copy()).view(DTYPES[dtype])
    wide = {"bfloat16": torch.float32, "complex32": torch.complex64}.get(dtype)
    if dtype.startswith("float8"):
        wide = torch.float32
    expected = (theirs.to(wide) if wide else theirs).numpy()
    ours = numbers(raw.view(stored_dtype(dtype)), dtype)
    assert ours.dtype == expected.dtype
    np.testing.assert_array_equal(ours, expected)


def test_what_is_no_number_stays_bytes() -> None:
    for dtype in set(DTYPE_SIZES) - set(_COMPARED):
        raw = np.arange(16, dtype=np.uint8).view(stored_dtype(dtype))
        assert raw.dtype.itemsize == DTYPE_SIZES[dtype] and raw.dtype.kind in "uif"
        if not is_number(dtype):
            assert numbers(raw, dtype) is raw


_FLOATS = st.lists(st.floats(width=32, allow_subnormal=False), max_size=40)


@steady
@given(_FLOATS, st.lists(st.integers(0, 40), max_size=4))
def test_statistics_are_numpys_however_it_is_cut(values: list[float], cuts: list[int]) -> None:
    array = np.array(values, "<f4")
    statistics = Statistics("float32")
    for part in np.split(array, sorted(cuts)):
        statistics.add(part)
    finite = array[np.isfinite(array)].astype("f8")
    assert (statistics.count, statistics.finite) == (len(values), len(finite))
    assert statistics.nans == np.isnan(array).sum() and statistics.infinite == np.isinf(array).sum()
    assert statistics.zeros == (array == 0).sum()
    if len(finite):
        assert (statistics.minimum, statistics.maximum) == (finite.min(), finite.max())
        scale = np.abs(finite).max()
        assert abs(statistics.mean - finite.mean()) <= 1e-9 * scale
        assert abs(statistics.std - finite.std()) <= 1e-6 * scale


def test_statistics_of_numbers_at_the_end_of_the_range_warn_of_nothing() -> None:
    statistics = Statistics("float64")
    statistics.add(np.array([1e308, -1e308, 1e308]))
    assert statistics.maximum == 1e308 and statistics.as_json()["std"] is not None


def _entry(dtype: str, size: int) -> Entry:
    return Entry("x", is_tensor=True, dtype=dtype, shape=(size,), size=size * DTYPE_SIZES[dtype])


@steady
@given(st.data())
def test_moves_are_numpys_however_it_is_cut(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 30))
    some = st.lists(st.floats(-1e3, 1e3, width=32), min_size=size, max_size=size)
    a, b = (np.array(data.draw(some), "<f4") for _ in range(2))
    cut = data.draw(st.integers(0, size))
    move = Move(_entry("float32", size), _entry("float32", size))
    for x, y in zip(np.split(a, [cut]), np.split(b, [cut]), strict=True):
        move.add(x, y)
    apart = np.abs(a.astype("f8") - b.astype("f8"))
    assert move.changed == (a != b).sum()
    assert move.greatest == apart.max()
    if np.any(a):
        expected = np.linalg.norm(apart) / np.linalg.norm(a.astype("f8"))
        assert move.relative == pytest.approx(expected, rel=1e-9)
    else:
        assert move.relative is None


def test_moves_of_what_broke_come_first() -> None:
    fine, broken = Move(_entry("float32", 2), _entry("float32", 2)), Move(_entry("float32", 2), _entry("float32", 2))
    fine.add(np.array([1, 1], "<f4"), np.array([9, 9], "<f4"))
    broken.add(np.array([1, np.nan], "<f4"), np.array([np.inf, np.nan], "<f4"))
    assert broken.order > fine.order and broken.changed == 1
    assert "1 became nan or inf" in broken.cells()


def test_moves_between_dtypes() -> None:
    move = Move(_entry("bfloat16", 2), _entry("float32", 2))
    move.add(np.array([0x3F80, 0x4000], "<u2"), np.array([1, 2.5], "<f4"))
    assert (move.changed, move.greatest) == (1, 0.5)


@pytest.mark.parametrize("shape", [(1001,), (3000,), (600, 2), (2, 1200), (2, 3, 1001), (1100, 1, 1)])
def test_every_element_is_printed_as_numpy_would(shape: tuple[int, ...]) -> None:
    array = np.arange(math.prod(shape)).reshape(shape)
    texts = "\n".join(_every_line(array)), np.array2string(array, threshold=sys.maxsize)
    ours, numpys = (re.sub(r"\[\s+", "[", text).split() for text in texts)
    assert ours == numpys
