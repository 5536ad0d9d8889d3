"""What of a checkpoint a conversion takes, and what it is called and made of afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec

from asyncdcp.errors import CorruptCheckpoint, InvalidOption, UnsupportedFormat
from asyncdcp.metadata import Metadata, TensorStorageMetadata
from asyncdcp.state_dict.options import longest_prefix, with_prefix
from asyncdcp.state_dict.pruning import children, choose, leaves

FLOATS: Final = ("float64", "float32", "float16", "bfloat16")


class Chosen(NamedTuple):
    """A tensor: its name and dtype in the checkpoint that is read, and in the one that is written."""

    source: str
    stored: str
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Selection:
    """``tensors`` to be written; ``aliases``, ``tree`` and ``values`` (tagged JSON) with their names afterwards."""

    tensors: tuple[Chosen, ...]
    aliases: dict[str, str]
    tree: Any
    values: dict[str, Any]


def select(
    metadata: Metadata, keys: Sequence[str] | None, rename: Mapping[str, str] | None, dtype: str | None
) -> Selection:
    """``keys`` are globs of the names in ``metadata``; ``rename`` maps names, or prefixes of them up to a dot, the
    longest first, and "" stands for all. ``dtype`` is what floating point numbers become.

    The containers are kept; a rename leaves one flat dict. ``InvalidOption`` for what matches nothing, or gives two
    things one name.
    """
    if dtype is not None and dtype not in FLOATS:
        raise InvalidOption(f"dtype takes one of {', '.join(FLOATS)}, not {dtype!r}")
    tree, values = _decoded(metadata)
    if keys is not None:
        tree, idle = choose(tree, keys)
        if idle:
            raise InvalidOption(f"keys {', '.join(idle)} match nothing in {metadata.storage_meta.checkpoint_id}")
    names = leaves(tree)
    primaries = _primaries(metadata, names)
    rules = _Rules(rename or {})
    moved = rules.apply(sorted(names))
    tensors = tuple(
        _chosen(metadata, source, moved[primary], dtype)
        for source, primary in primaries.items()
        if isinstance(metadata.state_dict_metadata[source], TensorStorageMetadata)
    )
    aliases = {
        moved[alias]: moved[primaries[source]]
        for alias, source in metadata.aliases.items()
        if alias in names and primaries[source] != alias
    }
    kept = {moved[name]: value for name, value in values.items() if name in names}
    return Selection(tensors, aliases, _flat(tree, moved) if rename else tree, kept)


def _decoded(metadata: Metadata) -> tuple[Any, dict[str, Any]]:
    try:
        tree = msgspec.json.decode(metadata.tree)
        return tree, {name: msgspec.json.decode(value) for name, value in metadata.values.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        path = metadata.storage_meta.checkpoint_id
        raise CorruptCheckpoint(f"{path}: its tree or values are not JSON ({error})", path=path) from error


def _primaries(metadata: Metadata, names: set[str]) -> dict[str, str]:
    """For each stored tensor or value that one of ``names`` means, the name among them that it goes by."""
    found = {name: name for name in metadata.state_dict_metadata if name in names}
    for alias, source in metadata.aliases.items():
        if alias in names:
            found.setdefault(source, alias)
    unknown = names - found.keys() - metadata.aliases.keys() - metadata.values.keys()
    if unknown:
        name = min(unknown)
        raise CorruptCheckpoint(f"the tree names {name!r:.200}, which is not there", tensors=[name])
    return found


def _chosen(metadata: Metadata, source: str, name: str, dtype: str | None) -> Chosen:
    entry = metadata.state_dict_metadata[source]
    assert isinstance(entry, TensorStorageMetadata)
    stored = entry.properties.dtype
    return Chosen(source, stored, name, dtype if dtype is not None and stored in FLOATS else stored, entry.size)


class _Rules:
    """New names by prefix."""

    def __init__(self, rules: Mapping[str, str]) -> None:
        self._rules = rules
        self._used: set[str] = set()

    def apply(self, names: Sequence[str]) -> dict[str, str]:
        """Each name's new one."""
        moved: dict[str, str] = {}
        owners: dict[str, str] = {}
        for name in names:
            new = moved[name] = self._renamed(name)
            if owners.setdefault(new, name) != name:
                raise InvalidOption(f"rename gives {owners[new]!r} and {name!r} the same name {new!r}")
        idle = [old for old in self._rules if old not in self._used]
        if idle:
            raise InvalidOption(f"rename: nothing is called {idle[0]!r} or begins with {idle[0] + '.'!r}")
        return moved

    def _renamed(self, name: str) -> str:
        old = longest_prefix(name, self._rules)
        if old is None:
            return name
        self._used.add(old)
        new = with_prefix(name, old, self._rules[old])
        if not new:
            raise InvalidOption(f"rename leaves {name!r} without a name")
        return new


def _flat(tree: Any, moved: Mapping[str, str]) -> Any:
    """One dict of all leaves, by their new names."""
    nodes = dict(_leaf_nodes(tree, moved.__getitem__))
    return {"dict": [list(nodes), list(nodes.values())]}


def _leaf_nodes(tree: Any, rename: Callable[[str], str]) -> list[tuple[str, Any]]:
    tag = next(iter(tree))
    content = tree[tag]
    if tag in ("t", "v"):
        return [(rename(content), {tag: rename(content)})]
    if tag == "subclass":
        name = tree["name"]
        raise UnsupportedFormat(f"{name} is a tensor subclass, and those cannot be renamed", tensors=[name])
    return [leaf for node in children(tag, content) for leaf in _leaf_nodes(node, rename)]
