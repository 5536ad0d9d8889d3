"""Stored elements as numpy arrays, without torch: the dtypes that numpy lacks are widened exactly.

Bytes are little-endian and row-major. What is no number of a whole byte or more (packed bits, integers below 8 bits)
stays as the bytes that are stored.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from asyncdcp.metadata import DTYPE_SIZES

Array: TypeAlias = NDArray[Any]

_NUMPY = ("complex128", "complex64", "float64", "float32", "float16", "bool")
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))


class _Small(NamedTuple):
    """An 8-bit float: bits of exponent and fraction, bias, the codes that are no number, those that are infinite."""

    exponent: int
    fraction: int
    bias: int
    nan: frozenset[int]
    infinite: frozenset[int] = frozenset()


_SMALL = {
    "float8_e4m3fn": _Small(4, 3, 7, frozenset({0x7F, 0xFF})),
    "float8_e4m3fnuz": _Small(4, 3, 8, frozenset({0x80})),
    "float8_e5m2": _Small(5, 2, 15, frozenset({0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF}), frozenset({0x7C, 0xFC})),
    "float8_e5m2fnuz": _Small(5, 2, 16, frozenset({0x80})),
}


def stored_dtype(dtype: str) -> str:
    """The numpy dtype of an element as it is stored: of the same size."""
    if dtype in _NUMPY:
        return dtype if dtype == "bool" else np.dtype(dtype).newbyteorder("<").str
    if dtype in _INTEGERS:
        return np.dtype(dtype).newbyteorder("<").str
    return f"<u{DTYPE_SIZES[dtype]}"


def numbers(stored: Array, dtype: str) -> Array:
    """The values of elements that were read as ``stored_dtype(dtype)``."""
    if dtype == "bfloat16":
        widened: Array = (stored.astype("<u4") << 16).view("<f4")
        return widened
    if dtype == "complex32":
        halves: Array = stored[..., None].view("<f2").astype("<f4").view("<c8")[..., 0]
        return halves
    if dtype in _SMALL or dtype == "float8_e8m0fnu":
        return _table(dtype)[stored]
    return stored


def is_widened(dtype: str) -> bool:
    """Whether numpy lacks the dtype, so that ``numbers`` gives another."""
    return dtype in ("bfloat16", "complex32", "float8_e8m0fnu", *_SMALL)


def is_number(dtype: str) -> bool:
    """Whether ``numbers`` gives values, and not the stored bytes."""
    return dtype in _NUMPY or dtype in _INTEGERS or is_widened(dtype)


@cache
def _table(dtype: str) -> Array:
    """The value of each of the 256 codes of an 8-bit float."""
    if dtype == "float8_e8m0fnu":
        powers = [2.0 ** (code - 127) for code in range(255)]
        return np.array([*powers, np.nan], "<f4")
    return np.array([_small(code, _SMALL[dtype]) for code in range(256)], "<f4")


def _small(code: int, kind: _Small) -> float:
    if code in kind.nan:
        return float("nan")
    sign = -1.0 if code & 0x80 else 1.0
    if code in kind.infinite:
        return sign * float("inf")
    fraction = code & ((1 << kind.fraction) - 1)
    exponent = (code & 0x7F) >> kind.fraction
    if exponent == 0:
        return float(sign * fraction * 2.0 ** (1 - kind.bias - kind.fraction))
    return float(sign * (1 + fraction / (1 << kind.fraction)) * 2.0 ** (exponent - kind.bias))
