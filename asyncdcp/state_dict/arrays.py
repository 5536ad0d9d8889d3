"""numpy arrays and scalars as plain values: dtype by its array-protocol string, shape, and the bytes.

numpy is never imported to look at a value: where it is not loaded, there is no value of it.
"""

from __future__ import annotations

import math
import re
import sys
from typing import TYPE_CHECKING, Any

from asyncdcp.errors import UnsupportedFormat
from asyncdcp.state_dict.leaves import Refusal, exactly, fields, from_base64, to_base64

if TYPE_CHECKING:
    import numpy

# Without the long doubles, whose size and padding are the platform's.
_DTYPE = re.compile(r"[<>|](b1|[iu][1248]|f[248]|c8|c16|[SU]\d{1,9}|[mM]8(\[\w{1,16}(/\d{1,9})?\])?)", re.ASCII)
_MAX_DIMS = 64


def encode_numpy(value: Any) -> dict[str, Any] | None:
    """A numpy array or scalar as ``{tag: content}``; None for everything else.

    Raises ``Refusal`` for dtypes that are more than plain bytes (object, structured, registered by others), and for
    scalar types that come back as another type (``longlong`` where that is 64 bits).
    """
    np: Any = sys.modules.get("numpy")
    if np is None:
        return None
    kind = type(value)
    if kind is np.ndarray:
        content = [_dtype_text(np, value.dtype), list(value.shape), to_base64(value.tobytes())]
        return {"ndarray": content}
    if kind is np.str_:
        return {"np_str": to_base64(str(value).encode("utf-8", "surrogatepass"))}
    if kind is np.bytes_:
        return {"np_bytes": to_base64(bytes(value))}
    if not isinstance(value, np.generic):
        return None
    text = _dtype_text(np, value.dtype)
    if np.dtype(text).type is not kind:
        raise Refusal(f"a scalar of dtype {text} comes back as {np.dtype(text).type.__name__}")
    return {"np": [text, to_base64(value.tobytes())]}


def is_numpy(kind: type) -> bool:
    """Whether ``kind`` is a numpy scalar type or exactly ndarray."""
    np: Any = sys.modules.get("numpy")
    return np is not None and (kind is np.ndarray or issubclass(kind, np.generic))


def _dtype_text(np: Any, dtype: numpy.dtype[Any]) -> str:
    text: str = dtype.str
    if _DTYPE.fullmatch(text) is None or dtype.itemsize == 0 or dtype != np.dtype(text):
        raise Refusal(f"its numpy dtype {str(dtype)[:80]} is not plain bytes")
    return text


def _numpy() -> Any:
    try:
        import numpy
    except ImportError as error:
        raise UnsupportedFormat("the checkpoint holds numpy values, and numpy is not installed") from error
    return numpy


def _dtype(np: Any, obj: Any) -> numpy.dtype[Any]:
    if _DTYPE.fullmatch(exactly(str, obj)) is None:
        raise ValueError("not a plain numpy dtype")
    try:
        dtype: numpy.dtype[Any] = np.dtype(obj)
    except TypeError as error:
        raise UnsupportedFormat(f"numpy {np.__version__} has no dtype {obj!r}") from error
    if dtype.itemsize == 0:
        raise ValueError("a dtype of no bytes")
    return dtype


def _items(dtype: numpy.dtype[Any], shape: list[int], data: bytes) -> Any:
    """A writable array over a copy of ``data``, which must be as long as dtype and shape say."""
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes do not fill shape {shape} of {dtype.str}")
    if dtype.kind == "b" and data.translate(None, b"\0\1"):
        raise ValueError("booleans are 0 or 1")
    return _numpy().ndarray(tuple(shape), dtype, bytearray(data))


def decode_array(obj: Any) -> Any:
    """An ``ndarray``; its memory is its own and writable, in C order. Allocates no more than the content's bytes."""
    text, shape, content = fields(obj, 3)
    dtype = _dtype(_numpy(), text)
    if len(exactly(list, shape)) > _MAX_DIMS or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError("not a shape")
    return _items(dtype, shape, from_base64(content))


def decode_scalar(obj: Any) -> Any:
    """A numpy scalar that is neither ``str_`` nor ``bytes_``."""
    text, content = fields(obj, 2)
    dtype = _dtype(_numpy(), text)
    if dtype.kind in "SU":
        raise ValueError("texts have tags of their own")
    return _items(dtype, [], from_base64(content))[()]


def decode_np_str(obj: Any) -> Any:
    """A ``numpy.str_``."""
    return _numpy().str_(from_base64(obj).decode("utf-8", "surrogatepass"))


def decode_np_bytes(obj: Any) -> Any:
    """A ``numpy.bytes_``."""
    return _numpy().bytes_(from_base64(obj))
