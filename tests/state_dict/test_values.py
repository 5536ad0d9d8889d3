"""The plain-value codec: exact round trips, and refusals."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import fractions
import io
import math
import pathlib
import pickle
import sys
import uuid
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdcp.errors import UnsupportedValue
from asyncdcp.state_dict.values import MAX_DEPTH, decode_value, encode_value


def through_json(value: Any, *, allow_pickle: bool = False) -> Any:
    data = msgspec.json.encode(encode_value(value, "x", allow_pickle=allow_pickle))
    return decode_value(msgspec.json.decode(data), "x", allow_pickle=allow_pickle)


# ── round trips ─────────────────────────────────────────────────────────────────────────────────────────────────────

_texts = st.text(st.characters(exclude_categories=[]), max_size=8)
_paths = st.sampled_from([pathlib.Path, pathlib.PurePosixPath, pathlib.PureWindowsPath])
_zones = st.sampled_from(
    [
        None,
        datetime.UTC,
        datetime.timezone(datetime.timedelta(hours=-3, seconds=7)),
        datetime.timezone(datetime.timedelta(hours=1), "näme"),
        zoneinfo.ZoneInfo("UTC"),
    ]
)
_hashable = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**80), 2**80),
    st.floats(),
    st.complex_numbers(),
    _texts,
    st.binary(max_size=8),
    st.lists(st.integers(0, 2**40), max_size=3).map(torch.Size),
    st.sampled_from([torch.float32, torch.bfloat16, torch.device("cpu"), torch.device("cuda", 3), torch.channels_last]),
    st.builds(lambda kind, text: kind(text.replace("\0", "")), _paths, _texts),
    st.datetimes(timezones=_zones),
    st.builds(lambda t, zone, fold: t.replace(tzinfo=zone, fold=fold), st.times(), _zones, st.integers(0, 1)),
    st.dates(),
    st.timedeltas(),
    st.builds(range, st.integers(), st.integers(-(2**70), 2**70), st.integers(1, 5)),
    st.uuids(),
    st.decimals(allow_nan=False),
    st.builds(np.float32, st.floats(width=32)),
    st.builds(np.float64, st.floats()),
    st.builds(np.int16, st.integers(-100, 100)),
    st.builds(np.bool_, st.booleans()),
    st.builds(np.complex64, st.just(1 + 2j)),
    st.builds(np.str_, st.text(max_size=4)),
    st.builds(np.bytes_, st.binary(max_size=4)),
    st.builds(lambda n: np.datetime64(n, "ms"), st.integers(-(2**40), 2**40)),
)
_dtypes = ["<f8", ">i4", "|b1", "<U3", "|S2", "<c16", "<f2", "<M8[ns]", "|u1"]
_arrays = st.builds(
    lambda dtype, shape: np.arange(math.prod(shape)).astype(dtype).reshape(shape),
    st.sampled_from([dtype for dtype in _dtypes if dtype not in ("|b1", "<U3", "|S2")]),
    st.lists(st.integers(0, 3), max_size=3),
)
_leaves = st.one_of(
    _hashable,
    _arrays,
    st.binary(max_size=8).map(bytearray),
    st.binary(max_size=8).map(io.BytesIO),
    st.builds(slice, st.none() | st.integers(), st.integers(), st.none()),
)


def _distinct(items: list[Any]) -> list[Any]:
    """Without what equals something earlier, so that sets and dicts of ``items`` are as long as it."""
    return list(dict.fromkeys(items))


_keys = st.lists(_hashable, max_size=3).map(_distinct)


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    items = st.lists(inner, max_size=3)
    pairs = st.builds(lambda keys, value: [(key, value) for key in keys], _keys, inner)
    return st.one_of(
        items,
        items.map(tuple),
        items.map(deque),
        items.map(lambda found: deque(found, maxlen=5)),
        pairs.map(dict),
        pairs.map(OrderedDict),
        pairs.map(lambda found: Counter(dict(found))),
        st.builds(lambda kind, found: defaultdict(kind, found), st.sampled_from([list, int, None, dict]), pairs),
        _keys.map(set),
        _keys.map(frozenset),
    )


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.recursive(_leaves, _containers, max_leaves=12))
def test_what_comes_back_equals_what_went_in_types_included(same, value):
    assert same(through_json(value), value)


@pytest.mark.parametrize(
    "value",
    [2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, -0.0, math.nan, -math.nan, math.inf, 5e-324, 1e22, 1.0, True, 1],
)
def test_numbers_at_the_edges(same, value):
    assert same(through_json(value), value)
    assert same(through_json(torch.Size([value])), torch.Size([value])) if type(value) is int else True


def test_ints_of_any_size_in_linear_time():
    assert through_json(-(10**6000)) == -(10**6000)  # more digits than int() takes in decimal
    assert through_json(1 << 4_000_000) == 1 << 4_000_000


@pytest.mark.parametrize("name", [name for name, value in vars(torch).items() if isinstance(value, torch.dtype)])
def test_every_dtype_of_torch(name):
    assert through_json(getattr(torch, name)) is getattr(torch, name)


@pytest.mark.parametrize("dtype", _dtypes)
def test_numpy_arrays_of_every_plain_kind_come_back_writable(same, dtype):
    array = np.array([["1", "0"], ["1", "0"]]).astype("<i8").astype(dtype)
    found = through_json(np.asfortranarray(array))
    assert same(found, array)
    found[0] = found[1]
    assert through_json(np.zeros((3, 0, 2), dtype)).shape == (3, 0, 2)


def test_a_bytesio_is_stored_whole_and_comes_back_at_its_start(same):
    stream = io.BytesIO(b"abc")
    stream.seek(2)
    assert same(through_json(stream), io.BytesIO(b"abc"))
    assert stream.tell() == 2


def test_what_was_encoded_shares_nothing_with_the_value():
    value: Any = {"a": [1, deque([2])]}
    encoded = encode_value(value, "x")
    value["a"][1].append(3)
    assert decode_value(encoded) == {"a": [1, deque([2])]}


def test_sets_are_encoded_in_one_order():
    """However they are walked, which for strings is different in every process."""
    for kind in (set, frozenset):
        one, other = kind([0, 8, 16]), kind([16, 8, 0])
        assert one == other and [*one] != [*other], "their hashes collide, so that who came first is first"
        assert encode_value(one, "x") == encode_value(other, "x")


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Text(str):
    pass


class _Level(enum.IntEnum):
    LOW = 1


class _Colour(enum.Enum):
    RED = 1


_Pair = collections.namedtuple("_Pair", "a b")


class _Zone(datetime.tzinfo):
    def utcoffset(self, dt: Any) -> None: ...
    def dst(self, dt: Any) -> None: ...
    def tzname(self, dt: Any) -> None: ...


class _Delta(datetime.timedelta):
    pass


class _Table(dict):  # type: ignore[type-arg]  # as users write it
    pass


def _with_attribute() -> OrderedDict[Any, Any]:
    ordered: OrderedDict[Any, Any] = OrderedDict()
    ordered.note = 1  # type: ignore[attr-defined]  # the point of the test
    return ordered


REFUSED = [
    (object(), "builtins.object"),
    (_Text("a"), "_Text"),
    (_Level.LOW, "_Level"),
    (_Colour.RED, "_Colour"),
    (_Pair(1, 2), "_Pair"),
    (_Delta(1), "_Delta"),
    (_Table(), "_Table"),
    (_with_attribute(), "note"),
    (fractions.Fraction(1, 3), "fractions.Fraction"),
    (datetime.datetime(2020, 1, 1, tzinfo=_Zone()), "_Zone"),
    (defaultdict(lambda: 1), "default_factory"),
    (np.array([None]), "object"),
    (np.zeros(2, "i4,i4"), "numpy.ndarray"),
    (np.zeros(2, np.longdouble), "not plain"),
    (np.longlong(1), "numpy.longlong"),
    (np.ma.masked_array([1]), "MaskedArray"),
    (np.dtype("f4"), "Float32DType"),
    (np.float32, "builtins.type"),
    (memoryview(b"a"), "memoryview"),
    (math.sin, "builtin_function"),
    (sys, "builtins.module"),
    (iter([1]), "list_iterator"),
    ({torch.nn.Linear}, "builtins.type"),
    (deque([torch.zeros(1)]), "hold it in a list or dict"),
]


@pytest.mark.parametrize(("value", "said"), REFUSED, ids=lambda item: item if isinstance(item, str) else "")
def test_what_cannot_be_stored_is_refused_by_name_type_and_way_out(value, said):
    for holder in (value, [value], {"k": (value,)}):
        with pytest.raises(UnsupportedValue) as caught:
            encode_value(holder, "model.extra.0")
        message = str(caught.value)
        assert "'model.extra.0'" in message
        assert said in message
        assert "allow_pickle=True" in message
        assert "off by default" in message
        assert caught.value.tensors == ("model.extra.0",)


def test_pickle_both_ways_when_it_is_allowed(same):
    value = [_Level.LOW, {"a": fractions.Fraction(1, 3)}, 5]
    assert same(through_json(value, allow_pickle=True), value)
    encoded = encode_value(value, "x", allow_pickle=True)
    with pytest.raises(UnsupportedValue, match=r"'x' was saved as a pickle.*allow_pickle=True"):
        decode_value(encoded, "x")


def test_what_cannot_be_pickled_either_is_refused():
    with pytest.raises(UnsupportedValue, match="cannot be pickled either"):
        encode_value(lambda: 1, "x", allow_pickle=True)


def test_a_pickle_that_cannot_be_read_names_the_entry():
    encoded = {"pickle": msgspec.to_builtins(pickle.dumps(object())[:-3])}
    with pytest.raises(UnsupportedValue, match="'x' was saved as a pickle that cannot be read here"):
        decode_value(encoded, "x", allow_pickle=True)


def test_what_holds_itself_or_is_nested_too_deep():
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(UnsupportedValue, match="holds itself"):
        encode_value(cycle, "x")
    deep: Any = 1
    for _ in range(MAX_DEPTH):
        deep = (deep,)
    assert through_json(deep) == deep
    with pytest.raises(UnsupportedValue, match="nested deeper"):
        encode_value([deep], "x")


def test_small_types_that_are_easy_to_get_wrong(same):
    for value in (uuid.UUID(int=5), decimal.Decimal("1.10"), decimal.Decimal("sNaN12"), torch.strided, True, 1, 1.0):
        assert repr(through_json(value)) == repr(value)
