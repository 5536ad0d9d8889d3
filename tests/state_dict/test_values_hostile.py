"""The plain-value codec against encodings that no save made: refused, within bounds, nothing executed."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdcp.errors import AsyncDCPError, CorruptCheckpoint, UnsupportedFormat, UnsupportedValue
from asyncdcp.state_dict.values import MAX_DEPTH, decode_value, encode_value


class _Trap:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("the pickle was executed",))


def _nested(depth: int, tag: str) -> Any:
    obj: Any = 1
    for _ in range(depth):
        obj = {tag: [obj]} if tag else [obj]
    return obj


HOSTILE = [
    {},
    {"unknown": 1},
    {"tuple": [], "list": []},
    {"__class__": "os.system"},
    {"int": "12345xyz"},
    {"int": "0x10"},
    {"int": " 1"},
    {"int": ""},
    {"int": 5},
    {"float": "1.5"},
    {"float": ["nan"]},
    {"complex": [1.0]},
    {"complex": [1, 2.0]},
    {"complex": [True, 2.0]},
    {"str": "not base64!"},
    {"str": "/w=="},
    {"bytes": 3},
    {"bytes": "YQ=\n="},
    {"bytes": "YQ"},
    {"bytes": "é"},
    {"size": [1, "2"]},
    {"size": 3},
    {"size": [1.0]},
    {"dtype": 5},
    {"dtype": ["float32"]},
    {"device": "cpu; import os"},
    {"device": "cuda:99999"},
    {"device": None},
    {"posix_path": 5},
    {"datetime": ["2020-01-01T00:00:00", 0]},
    {"datetime": ["2020-01-01T00:00:00+01:00", 0, None]},
    {"datetime": ["2020-01-01T00:00:00", 7, None]},
    {"datetime": ["2020-01-01T00:00:00", True, None]},
    {"datetime": ["garbage", 0, None]},
    {"datetime": ["2020-01-01T00:00:00", 0, "../../etc/passwd"]},
    {"datetime": ["2020-01-01T00:00:00", 0, "/etc/passwd"]},
    {"datetime": ["2020-01-01T00:00:00", 0, [[2, 0, 0]]]},
    {"datetime": ["2020-01-01T00:00:00", 0, []]},
    {"datetime": ["2020-01-01T00:00:00", 0, [[0, 0, 0], "a", "b"]]},
    {"date": "2020-13-01"},
    {"time": ["25:00", 0, None]},
    {"timedelta": [10**30, 0, 0]},
    {"timedelta": [1.5, 0, 0]},
    {"range": [0, 1, 0]},
    {"range": [0.5, 1, 1]},
    {"uuid": "zz"},
    {"decimal": "one"},
    {"set": [[1]]},
    {"set": [1, 1]},
    {"set": 5},
    {"frozenset": [{"set": []}]},
    {"dict": [[1]]},
    {"dict": [[1, 2], [1, 3]]},
    {"dict": [[[1], 2]]},
    {"dict": {"a": 1}},
    {"counter": [[1, 2, 3]]},
    {"ordered": 7},
    {"defaultdict": ["os.system", []]},
    {"defaultdict": ["eval", []]},
    {"defaultdict": [["list"], []]},
    {"deque": [1, [1, 2]]},
    {"deque": [-1, []]},
    {"deque": [True, []]},
    {"deque": [2**70, []]},
    {"deque": [[], []]},
    {"slice": [1, 2]},
    {"np": ["|O", "AAAAAAAAAAA="]},
    {"np": ["<f8", "AAAA"]},
    {"np": ["<f8,<f8", "AAAA"]},
    {"np": ["|S1", "YQ=="]},
    {"np": ["<f16", "AAAAAAAAAAAAAAAAAAAAAA=="]},
    {"np_str": "/w=="},
    {"ndarray": ["<f8", [10**12], "AAAA"]},
    {"ndarray": ["<f8", [-1, -1], "AAAAAAAAAAA="]},
    {"ndarray": ["<f8", [True], "AAAAAAAAAAA="]},
    {"ndarray": ["<f8", [1] * 65, "AAAAAAAAAAA="]},
    {"ndarray": ["<U0", [10**12], ""]},
    {"ndarray": ["|S0", [10**12], ""]},
    {"ndarray": ["<f8", [0, 2**63], ""]},
    {"ndarray": ["<f8", [2**31, 2**31, 0, 2**31], ""]},
    {"ndarray": ["|O", [1], "AAAAAAAAAAA="]},
    {"ndarray": ["|b1", [1], "Ag=="]},
    {"ndarray": ["<U9999", [1], ""]},
    {"ndarray": "x"},
    {"pickle": 5, "x": 1},
    _nested(MAX_DEPTH + 2, ""),
    _nested(MAX_DEPTH + 2, "tuple"),
    _nested(5000, ""),
    _nested(5000, "deque"),
    object(),
    (1, 2),
]


@pytest.mark.parametrize("obj", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_encoding_is_a_corrupt_checkpoint(obj):
    with pytest.raises(CorruptCheckpoint, match=r"the value 'a\.b' is .{1,300}$"):
        decode_value(obj, "a.b")


@pytest.mark.parametrize(
    "obj",
    [
        {"dtype": "float3"},
        {"layout": "__builtins__"},
        {"device": "flux"},
        {"windows_path": "a"},
        {"datetime": ["2020-01-01T00:00:00", 0, "Mars/Olympus"]},
        {"np": ["<M8[parsec]", "AAAAAAAAAAA="]},
    ],
)
def test_what_this_machine_lacks_is_an_unsupported_format(obj):
    for holder in (obj, [[obj]]):
        with pytest.raises(UnsupportedFormat, match=r"^the value 'a\.b' cannot be read here: .* (no|not) .*$"):
            decode_value(holder, "a.b")


def test_a_pickle_is_never_executed_unasked():
    encoded = encode_value(_Trap(), "x", allow_pickle=True)
    with pytest.raises(UnsupportedValue):
        decode_value([{"tuple": [encoded]}], "x")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(sorted({tag for obj in HOSTILE if type(obj) is dict for tag in obj})), inner, max_size=1
        )
    ),
    max_leaves=8,
)


@settings(derandomize=True, deadline=None, max_examples=500)
@given(_json)
def test_any_json_decodes_or_raises_one_of_ours(obj):
    with contextlib.suppress(AsyncDCPError):
        decode_value(obj)
