"""Plain values as a person reads them, from their tagged JSON and without torch; nothing of it is run or trusted.

``state_dict/values.py`` makes values of it. Here they only become text, so that what only torch could make (a dtype, a
device) is shown too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from asyncdcp.cli.text import shown

_DEPTH = 8
_BINARY = ("bytes", "bytearray", "bytesio", "pickle", "np", "np_str", "np_bytes")


def plain_text(encoded: msgspec.Raw | None, limit: int = 60) -> str:
    """At most ``limit`` printable characters of a value; ``?`` for one that is not there or malformed."""
    if encoded is None:
        return "?"
    try:
        text = shown(_text(msgspec.json.decode(encoded), 0))
    except (msgspec.MsgspecError, ValueError, TypeError, LookupError, RecursionError):
        return "?"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _text(obj: Any, depth: int) -> str:
    if depth > _DEPTH:
        return "…"
    if isinstance(obj, list):
        return f"[{_items(obj, depth)}]"
    if not isinstance(obj, dict):
        return repr(obj)
    ((tag, content),) = obj.items()
    shape = _SHAPES.get(tag)
    if shape is not None:
        return shape(content, depth)
    return f"{tag} {_text(content, depth + 1)}" if isinstance(content, (list, dict)) else f"{tag} {content}"


def _items(content: list[Any], depth: int) -> str:
    return ", ".join(_text(item, depth + 1) for item in content)


def _pairs(content: list[Any], depth: int) -> str:
    return ", ".join(f"{_text(key, depth + 1)}: {_text(item, depth + 1)}" for key, item in content)


def _mapping(content: list[Any], depth: int) -> str:
    return f"{{{_pairs(content, depth)}}}"


def _integer(content: str, _: int) -> str:
    return str(int(content, 16)) if len(content) < 1000 else f"0x{content}"


def _unseen(tag: str, _: Any, __: int) -> str:
    return f"<{tag}>"


_SHAPES: dict[str, Callable[[Any, int], str]] = {
    "tuple": lambda content, depth: f"({_items(content, depth)}{',' if len(content) == 1 else ''})",
    "set": lambda content, depth: f"{{{_items(content, depth)}}}",
    "frozenset": lambda content, depth: f"frozenset({{{_items(content, depth)}}})",
    "deque": lambda content, depth: f"deque([{_items(content[1], depth)}])",
    "dict": _mapping,
    "ordered": _mapping,
    "counter": lambda content, depth: f"Counter({_mapping(content, depth)})",
    "defaultdict": lambda content, depth: f"defaultdict({content[0]}, {_mapping(content[1], depth)})",
    "float": lambda content, _: str(content),
    "int": _integer,
    "ndarray": lambda content, _: f"ndarray {content[0]} {content[1]}",
    **{tag: partial(_unseen, tag) for tag in _BINARY},
}
