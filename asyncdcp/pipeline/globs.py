"""Globs of names: what ``save(keys=…)``, ``load(keys=…)`` and a conversion choose of a state or a checkpoint."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

from asyncdcp.errors import InvalidOption
from asyncdcp.pipeline.trees import names_in

_WILD: Final = re.compile(r"[*?[]")


class Globs:
    """Globs of whole FQNs, of which ``*`` also matches dots. What is no glob but a name is looked up, since there may
    be thousands.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = keys
        self._patterns = {key: re.compile(fnmatch.translate(key)) for key in keys if _WILD.search(key)}
        self._names = {key for key in keys if key not in self._patterns}
        self._any = re.compile("|".join(pattern.pattern for pattern in self._patterns.values()) or r"(?!)")

    def match(self, name: str) -> bool:
        """Whether one of them matches ``name``."""
        return name in self._names or self._any.fullmatch(name) is not None

    def idle(self, names: Collection[str]) -> list[str]:
        """Those that match none of ``names``."""
        known = {*names}
        return [key for key in self._keys if not self._matches_any(key, known)]

    def _matches_any(self, key: str, names: set[str]) -> bool:
        pattern = self._patterns.get(key)
        return key in names if pattern is None else any(map(pattern.match, names))


def idle_everywhere(keys: Sequence[str], trees: Iterable[Any]) -> list[str]:
    """The globs that match nothing in any of some trees."""
    idle = [*keys]
    for tree in trees:
        if not idle:
            break
        idle = Globs(idle).idle({*names_in(tree)})
    return idle


def nothing_matched(keys: Sequence[str], state: str, path: str | None = None) -> InvalidOption:
    """The error for globs that choose nothing of what is to be saved."""
    message = f"keys={[*keys]!r} match nothing in {state}; the globs are of whole FQNs, such as model.*"
    return InvalidOption(message, path=path)
