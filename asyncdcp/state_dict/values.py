"""Plain values as tagged JSON, types kept: what ``json`` holds itself as it is, all else as ``{tag: content}``.

None, bool, ints of 64 bits, finite floats, well-formed str and lists of encodable values stand for themselves; every
other type has one tag. Types are matched exactly: a subclass (an IntEnum, a namedtuple, a str of one's own) is refused,
never taken for its base. Decoding trusts nothing: it runs no code and imports no module of the checkpoint's choosing,
bounds its recursion, and allocates no more than a small multiple of what it is given.
"""

from __future__ import annotations

import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

import msgspec
import torch

from asyncdcp.errors import AsyncDCPError, CorruptCheckpoint, UnsupportedFormat, UnsupportedValue
from asyncdcp.state_dict import arrays
from asyncdcp.state_dict.leaves import INT64, LEAVES, Refusal, exactly, fields, from_base64, to_base64

MAX_DEPTH = 100
"""Containers may be nested this deep, in a value and in a state's tree. JSON nests up to three times as deep."""

FACTORIES: dict[str, Callable[[], Any] | None] = {
    "None": None,
    **{kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)},
    **{kind.__name__: kind for kind in (OrderedDict, Counter, deque)},
}
"""The factories that a defaultdict may have, by the names under which they are stored."""

WAY_OUT = (
    "Turn it into tensors or plain values, give it a state_dict() and a load_state_dict(), or pass allow_pickle=True, "
    "which is off by default and has to be given again at load."
)

_Sub = Callable[[Any], Any]
_MALFORMED = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)


def unsupported(name: str, value: Any, reason: str = "", way_out: str = WAY_OUT) -> UnsupportedValue:
    """The refusal of ``value``, which stands at FQN ``name``: its type in full, why, and the way out."""
    kind = type(value)
    because = f": {reason}" if reason else ""
    message = f"{name!r} is a {kind.__module__}.{kind.__qualname__}, which cannot be stored{because}. {way_out}"
    return UnsupportedValue(message, tensors=[name])


def factory_name(mapping: defaultdict[Any, Any]) -> str:
    """The stored name of a defaultdict's factory; raises ``Refusal`` for one that is not in ``FACTORIES``."""
    for name, factory in FACTORIES.items():
        if mapping.default_factory is factory:
            return name
    known = ", ".join(FACTORIES)
    raise Refusal(f"its default_factory is {mapping.default_factory!r:.80}, and only {known} are kept")


# ── containers ──────────────────────────────────────────────────────────────────────────────────────────────────────


class _Container(NamedTuple):
    """As ``leaves.Leaf``, with the codec of what is inside as second argument."""

    tag: str
    kind: type
    encode: Callable[[Any, _Sub], Any]
    decode: Callable[[Any, _Sub], Any]


def _encode_list(value: Iterable[Any], sub: _Sub) -> list[Any]:
    return list(map(sub, value))


def _decode_list(obj: Any, sub: _Sub) -> list[Any]:
    return list(map(sub, exactly(list, obj)))


def _encode_set(value: Iterable[Any], sub: _Sub) -> list[Any]:
    # The order of a set differs between processes; what is stored must not.
    return sorted(map(sub, value), key=msgspec.json.encode)


def _decode_set(obj: Any, sub: _Sub) -> set[Any]:
    items = _decode_list(obj, sub)
    result = set(items)
    if len(result) != len(items):
        raise ValueError("the same element twice")
    return result


def _encode_pairs(value: dict[Any, Any], sub: _Sub) -> list[Any]:
    return [[sub(key), sub(item)] for key, item in value.items()]


def _encode_bare(value: dict[Any, Any], sub: _Sub) -> list[Any]:
    """The pairs of a dict whose type lets attributes be set on it, which would be lost."""
    if vars(value):
        raise Refusal(f"it has attributes: {', '.join(map(repr, vars(value)))[:80]}")
    return _encode_pairs(value, sub)


def _decode_pairs(obj: Any, sub: _Sub, result: dict[Any, Any]) -> dict[Any, Any]:
    for pair in exactly(list, obj):
        key, item = map(sub, fields(pair, 2))
        if key in result:
            raise ValueError("the same key twice")
        result[key] = item
    return result


def _decode_defaultdict(obj: Any, sub: _Sub) -> Any:
    name, pairs = fields(obj, 2)
    return _decode_pairs(pairs, sub, defaultdict(FACTORIES[exactly(str, name)]))


def _decode_deque(obj: Any, sub: _Sub) -> deque[Any]:
    bound, content = fields(obj, 2)
    if bound is not None and not 0 <= exactly(int, bound) < INT64:
        raise ValueError("not a maxlen")
    items = _decode_list(content, sub)
    if bound is not None and len(items) > bound:
        raise ValueError("more items than maxlen")
    return deque(items, bound)


_CONTAINERS = (
    _Container("tuple", tuple, _encode_list, lambda obj, sub: tuple(_decode_list(obj, sub))),
    _Container("set", set, _encode_set, _decode_set),
    _Container("frozenset", frozenset, _encode_set, lambda obj, sub: frozenset(_decode_set(obj, sub))),
    _Container("dict", dict, _encode_pairs, lambda obj, sub: _decode_pairs(obj, sub, {})),
    _Container("ordered", OrderedDict, _encode_bare, lambda obj, sub: _decode_pairs(obj, sub, OrderedDict())),
    _Container("counter", Counter, _encode_bare, lambda obj, sub: _decode_pairs(obj, sub, Counter())),
    _Container(
        "defaultdict",
        defaultdict,
        lambda value, sub: [factory_name(value), _encode_pairs(value, sub)],
        _decode_defaultdict,
    ),
    _Container("deque", deque, lambda value, sub: [value.maxlen, _encode_list(value, sub)], _decode_deque),
    _Container(
        "slice",
        slice,
        lambda value, sub: [sub(value.start), sub(value.stop), sub(value.step)],
        lambda obj, sub: slice(*map(sub, fields(obj, 3))),
    ),
)

_LEAF_BY_KIND = {leaf.kind: leaf for leaf in LEAVES}
_CONTAINER_BY_KIND = {container.kind: container for container in _CONTAINERS}
_CONTAINER_BY_TAG = {container.tag: container for container in _CONTAINERS}
_LEAF_DECODERS: dict[str, Callable[[Any], Any]] = {
    **{leaf.tag: leaf.decode for leaf in LEAVES},
    "ndarray": arrays.decode_array,
    "np": arrays.decode_scalar,
    "np_str": arrays.decode_np_str,
    "np_bytes": arrays.decode_np_bytes,
}

PLAIN_KINDS: frozenset[type] = frozenset({type(None), bool, *_LEAF_BY_KIND, set, frozenset, Counter, deque, slice})
"""The types that are one value, whatever is in them; numpy's are these too, see ``arrays.is_numpy``."""


# ── the two directions ──────────────────────────────────────────────────────────────────────────────────────────────


def encode_value(value: Any, name: str, *, allow_pickle: bool = False) -> Any:
    """``value`` as an object that JSON holds; ``name`` is its FQN, for messages.

    The result shares nothing that changes with ``value``: the value may be mutated at once. What cannot be stored, at
    any depth, raises ``UnsupportedValue``, or is pickled with ``allow_pickle``.
    """
    kind = type(value)
    if kind is float and isfinite(value):
        return value
    if kind is int and -INT64 <= value < INT64:
        return value
    return _encode(value, name, 0, allow_pickle)


def _encode(value: Any, name: str, depth: int, allow_pickle: bool) -> Any:  # noqa: FBT001  # goes through partial()
    kind = type(value)
    if _is_json(kind, value):
        return value
    try:
        leaf = _LEAF_BY_KIND.get(kind)
        if leaf is not None:
            return {leaf.tag: leaf.encode(value)}
        container = _CONTAINER_BY_KIND.get(kind)
        if container is not None or kind is list:
            if depth >= MAX_DEPTH:
                raise unsupported(name, value, f"it is nested deeper than {MAX_DEPTH} levels, or holds itself")
            sub = partial(_encode, name=name, depth=depth + 1, allow_pickle=allow_pickle)
            return _encode_list(value, sub) if container is None else {container.tag: container.encode(value, sub)}
        array = arrays.encode_numpy(value)
        if array is not None:
            return array
    except Refusal as refusal:
        return _pickled(value, name, str(refusal), allow_pickle=allow_pickle)
    inside = "it is inside a value such as a set or deque; hold it in a list or dict" if depth else ""
    return _pickled(value, name, inside if isinstance(value, torch.Tensor) else "", allow_pickle=allow_pickle)


def _is_json(kind: type, value: Any) -> bool:
    """Whether JSON holds ``value`` exactly, type included."""
    if kind is str:
        try:
            return value.isascii() or bool(value.encode())
        except UnicodeEncodeError:
            return False
    if kind is int:
        return bool(-INT64 <= value < INT64)
    return value is None or kind is bool or (kind is float and isfinite(value))


def _pickled(value: Any, name: str, reason: str, *, allow_pickle: bool) -> Any:
    if not allow_pickle:
        raise unsupported(name, value, reason)
    try:
        return {"pickle": to_base64(pickle.dumps(value, protocol=4))}
    except Exception as error:  # reducers of any class run here, and raise what they like
        raise unsupported(name, value, f"it cannot be pickled either ({error})"[:300]) from error


def decode_value(obj: Any, name: str = "", *, allow_pickle: bool = False) -> Any:
    """The value that ``encode_value`` was given, from decoded JSON that nobody has checked; ``name`` is for messages.

    Raises ``CorruptCheckpoint`` for everything that ``encode_value`` does not give, ``UnsupportedFormat`` for what
    this torch, numpy or system lacks, and ``UnsupportedValue`` for a pickle without ``allow_pickle``.
    """
    return _decode(obj, name, 0, allow_pickle)


def _decode(obj: Any, name: str, depth: int, allow_pickle: bool) -> Any:  # noqa: FBT001  # goes through partial()
    kind = type(obj)
    if obj is None or kind is str or kind is int or kind is float or kind is bool:
        return obj
    if depth > MAX_DEPTH:
        raise CorruptCheckpoint(f"the value {name!r} is nested deeper than {MAX_DEPTH} levels")
    sub = partial(_decode, name=name, depth=depth + 1, allow_pickle=allow_pickle)
    if kind is list:
        return _decode_list(obj, sub)
    if kind is not dict or len(obj) != 1:
        raise CorruptCheckpoint(f"the value {name!r} is malformed: one tag expected in each object")
    ((tag, content),) = obj.items()
    try:
        if tag in _LEAF_DECODERS:
            return _decode_leaf(tag, content, name)
        if tag in _CONTAINER_BY_TAG:
            return _CONTAINER_BY_TAG[tag].decode(content, sub)
    except AsyncDCPError:  # some are a ValueError or TypeError too
        raise
    except _MALFORMED as error:
        raise CorruptCheckpoint(f"the value {name!r} is malformed: {tag}: {error!s:.200}") from error
    if tag == "pickle":
        return _unpickled(content, name, allow_pickle=allow_pickle)
    raise CorruptCheckpoint(f"the value {name!r} is malformed: unknown tag {tag!s:.40}")


def _decode_leaf(tag: str, content: Any, name: str) -> Any:
    try:
        return _LEAF_DECODERS[tag](content)
    except UnsupportedFormat as error:  # which does not know the name
        raise UnsupportedFormat(f"the value {name!r} cannot be read here: {error}") from error


def _unpickled(content: Any, name: str, *, allow_pickle: bool) -> Any:
    if not allow_pickle:
        raise UnsupportedValue(
            f"{name!r} was saved as a pickle, which can run any code. Pass allow_pickle=True at load if you trust "
            "the checkpoint's origin; it is off by default.",
            tensors=[name],
        )
    try:
        data = from_base64(content)
    except _MALFORMED as error:
        raise CorruptCheckpoint(f"the value {name!r} is malformed: pickle: {error!s:.200}") from error
    try:
        return pickle.loads(data)  # noqa: S301  # only with the caller's explicit allow_pickle
    except Exception as error:  # a pickle raises what it likes
        message = f"{name!r} was saved as a pickle that cannot be read here: {type(error).__name__}: {error!s:.200}"
        raise UnsupportedValue(message, tensors=[name]) from error
