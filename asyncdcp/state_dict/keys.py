"""Keys of the containers in a state's tree: str, int, bool, None, float, and tuples of these, types kept.

Trees of two saves are compared with ``==``, where ``1 == True == 1.0``. So every key's encoding differs from every
other's under ``==``: bool and float are tagged, float as its hexadecimal text.
"""

from __future__ import annotations

from typing import Any

from asyncdcp.errors import CorruptCheckpoint, UnsupportedValue
from asyncdcp.state_dict.leaves import decode_int, encode_int, exactly
from asyncdcp.state_dict.values import MAX_DEPTH

_MALFORMED = (ValueError, TypeError, LookupError, ArithmeticError)


def encode_key(key: Any, path: str, depth: int = 0) -> Any:
    """``key`` as an object that JSON holds; ``path`` shows its container. Raises ``UnsupportedValue``."""
    kind = type(key)
    if kind is str:
        if not (key.isascii() or _well_formed(key)):
            raise _refusal(key, path, "a str with lone surrogates")
        return key
    if kind is int:
        return encode_int(key)
    if key is None:
        return None
    if kind is bool:
        return {"bool": key}
    if kind is float:
        return {"float": key.hex()}
    if kind is tuple and depth < MAX_DEPTH:
        return {"tuple": [encode_key(part, path, depth + 1) for part in key]}
    raise _refusal(key, path, f"a {kind.__module__}.{kind.__qualname__}")


def _well_formed(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refusal(key: Any, path: str, what: str) -> UnsupportedValue:
    message = (
        f"{path} has the key {key!r:.80}, which is {what}. Keys may be str, int, bool, None, float or tuples of these"
    )
    return UnsupportedValue(message)


def decode_key(obj: Any) -> Any:
    """The key that ``encode_key`` was given, from JSON that nobody has checked. Raises ``CorruptCheckpoint``."""
    try:
        return _decode(obj, 0)
    except _MALFORMED as error:
        raise CorruptCheckpoint(f"the tree has a malformed key: {error!s:.200}") from error


def _decode(obj: Any, depth: int) -> Any:
    if obj is None or type(obj) is str:
        return obj
    if type(obj) is not dict or "int" in obj:
        return decode_int(obj)
    if len(obj) != 1 or depth > MAX_DEPTH:
        raise ValueError("one tag expected")
    ((tag, content),) = obj.items()
    if tag == "bool":
        return exactly(bool, content)
    if tag == "float":
        return float.fromhex(exactly(str, content))
    if tag == "tuple":
        return tuple([_decode(part, depth + 1) for part in exactly(list, content)])
    raise ValueError("unknown tag")
