"""What a checkpoint holds, entry by entry: tensors, tied names and plain values, these as a person reads them.

``state_dict/values.py`` makes values of their tagged JSON. Here they only become text, so that torch is not needed, and
what only torch could make (a dtype, a device) is shown too; nothing of it is run or trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import Any

import click
import msgspec

from asyncdcp.cli.text import shown
from asyncdcp.metadata import DTYPE_SIZES, MetadataIndex, TensorStorageMetadata
from asyncdcp.pipeline.formats import ReadableCheckpoint

_DEPTH = 8
_BINARY = ("bytes", "bytearray", "bytesio", "pickle", "np", "np_str", "np_bytes")


@dataclass(frozen=True)
class Entry:
    """A tensor (``is_tensor``), or a plain value, whose tagged JSON is ``value`` (None where another rank has it).

    A tied name has the tensor's properties, and its name as ``alias_of``. ``size`` is in bytes, of a whole tensor.
    """

    name: str
    is_tensor: bool
    dtype: str = ""
    shape: tuple[int, ...] = ()
    size: int = 0
    chunks: int = 0
    files: tuple[str, ...] = ()
    alias_of: str | None = None
    value: msgspec.Raw | None = None

    @property
    def stored_name(self) -> str:
        """The name under which the tensor's bytes are."""
        return self.alias_of or self.name

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        if not self.is_tensor:
            return {"name": self.name, "kind": "value", "value": self.value}
        return {
            "name": self.name,
            "kind": "tensor",
            "dtype": self.dtype,
            "shape": self.shape,
            "bytes": self.size,
            "chunks": self.chunks,
            "files": self.files,
            "alias_of": self.alias_of,
        }


def entries_of(reader: ReadableCheckpoint) -> list[Entry]:
    """All entries in the order of the state that was saved, as far as the checkpoint's tree tells it."""
    metadata = reader.metadata
    entries = {name: _entry(reader, name) for name in metadata.state_dict_metadata}
    for name, target in metadata.aliases.items():
        entries[name] = replace(entries[target], name=name, alias_of=target)
    try:
        order = _names_in(msgspec.json.decode(metadata.tree))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):  # only a load needs it
        order = iter(())
    places = {name: place for place, name in enumerate(order)}
    return sorted(entries.values(), key=lambda entry: places.get(entry.name, len(places)))


def _names_in(node: Any) -> Iterator[str]:
    """The names at the leaves of a state's tree, in order; whatever is malformed is passed over."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            name = node.get("t", node.get("v"))
            if isinstance(name, str):
                yield name
            else:
                waiting += reversed(node.values())
        elif isinstance(node, list):
            waiting += reversed(node)


def _entry(reader: ReadableCheckpoint, name: str) -> Entry:
    metadata = reader.metadata
    stored = metadata.state_dict_metadata[name]
    if not isinstance(stored, TensorStorageMetadata):
        return Entry(name, is_tensor=False, value=metadata.values.get(name))
    places = [metadata.storage_data[MetadataIndex(name, chunk.offsets)].file for chunk in stored.chunks]
    size = prod(stored.size) * DTYPE_SIZES[stored.properties.dtype]
    files = tuple(dict.fromkeys(places))
    return Entry(
        name,
        is_tensor=True,
        dtype=stored.properties.dtype,
        shape=stored.size,
        size=size,
        chunks=len(places),
        files=files,
    )


def chosen(entries: Sequence[Entry], globs: Sequence[str]) -> list[Entry]:
    """The entries that match any of the globs; an error for a glob that none does."""
    for glob in globs:
        if not any(fnmatchcase(entry.name, glob) for entry in entries):
            raise click.ClickException(no_such_name(glob, [entry.name for entry in entries]))
    return [entry for entry in entries if any(fnmatchcase(entry.name, glob) for glob in globs)]


def no_such_name(name: str, names: Sequence[str], shown_by: str = "asyncdcp inspect CKPT") -> str:
    """The message for a name or glob that fits nothing, with what may have been meant."""
    near = get_close_matches(name, names, n=3, cutoff=0.5) or [each for each in names if name.strip("*?.") in each][:3]
    if near:
        return f"nothing is named {name}; did you mean {' or '.join(near)}?"
    if not names:
        return f"nothing is named {name}; the checkpoint holds no tensors"
    return f"nothing is named {name}; names are such as {names[0]} ({shown_by} shows them)"


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
