"""The nested state that a DCP checkpoint was saved from, put together again from its flat names.

DCP stores for each name the path at which it stood. What it does not keep: empty dicts, the types of mappings, and
keys that were no strings, of which the numbers of an optimizer's parameters are given back here, since its
``load_state_dict`` needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from asyncdcp.errors import CorruptCheckpoint
from asyncdcp.state_dict.values import MAX_DEPTH

Path: TypeAlias = tuple[str | int, ...]

_GAPS = 1000
"""How many entries of a list may be missing: DCP drops empty dicts, and what follows keeps its number."""


class _Branch(dict[str | int, Any]):
    """A container under way: a dict, or a list by its indexes."""


def build(paths: Mapping[str, Path], leaves: Mapping[str, Any], location: str) -> Any:
    """The nested state of ``leaves``, each at its path; ``CorruptCheckpoint`` for paths that contradict each other."""
    root = _Branch()
    for name, leaf in leaves.items():
        *outer, last = paths[name]
        if len(outer) >= MAX_DEPTH:
            raise CorruptCheckpoint(
                f"{location}: {name!r:.200} is nested deeper than {MAX_DEPTH} levels", path=location
            )
        branch = root
        for step in outer:
            inner = branch.setdefault(step, _Branch())
            if not isinstance(inner, _Branch):
                raise _contradiction(location, name)
            branch = inner
        if last in branch:
            raise _contradiction(location, name)
        branch[last] = leaf
    return _finished(root, location)


def paths_of(planner_data: Any, names: Iterable[str]) -> dict[str, Path]:
    """The path of each name as the default planner stored it; a name without one is a key of the state itself."""
    known = planner_data if isinstance(planner_data, dict) else {}
    paths = {}
    for name in names:
        path = known.get(name)
        paths[name] = path if isinstance(path, tuple) and path else (name,)
    return paths


def _finished(branch: _Branch, location: str) -> Any:
    entries = {key: _finished(leaf, location) if isinstance(leaf, _Branch) else leaf for key, leaf in branch.items()}
    if all(type(key) is int for key in entries) and entries:
        return _listed({int(key): leaf for key, leaf in entries.items()}, location)
    if any(type(key) is int for key in entries):
        raise CorruptCheckpoint(f"{location}: its names make one container both a dict and a list", path=location)
    _number_parameters(entries)
    return entries


def _listed(entries: dict[int, Any], location: str) -> list[Any]:
    length = max(entries) + 1
    if min(entries) < 0 or length > len(entries) + _GAPS:
        raise CorruptCheckpoint(f"{location}: its names make a list of {length} entries, most missing", path=location)
    return [entries.get(index) for index in range(length)]


def _number_parameters(entries: dict[Any, Any]) -> None:
    """Makes an optimizer's state by number of what DCP made a state by text, if it is one."""
    state, groups = entries.get("state"), entries.get("param_groups")
    if not isinstance(state, dict) or not isinstance(groups, list):
        return
    numbers = {
        str(number): number
        for group in groups
        if isinstance(group, dict) and isinstance(group.get("params"), list)
        for number in group["params"]
        if type(number) is int
    }
    if state and all(key in numbers for key in state):
        entries["state"] = {numbers[key]: leaf for key, leaf in state.items()}


def _contradiction(location: str, name: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"{location}: {name!r:.200} stands where another name does, or within it", path=location)
