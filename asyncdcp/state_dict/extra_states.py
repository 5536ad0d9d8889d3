"""What modules store of their own (``get_extra_state``): whatever a checkpoint has is given to ``set_extra_state``, as
torch does. So for these entries the checkpoint decides, where both sides have one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from asyncdcp.train_state import canonical_name

_ROOT = re.compile(r"(?:.*?\.)?_extra_state(?=[.#]|$)", re.DOTALL)


def is_extra_state(key: object) -> bool:
    """Whether a dict's key is one under which a module's ``state_dict()`` has what ``get_extra_state`` gave."""
    return isinstance(key, str) and (key == "_extra_state" or key.endswith("._extra_state"))


def extra_state_of(name: str) -> str | None:
    """The FQN of the extra state to which ``name`` belongs, or that it is; None if it is of none."""
    found = _ROOT.match(name)
    return None if found is None else found[0]


def pair_extra_states(own: Mapping[str, object], stored: Mapping[str, object]) -> dict[str, str]:
    """The stored FQN for each of the state's: equal ones, and those that are equal without the steps of wrappers, if
    that is one to one.
    """
    pairs = {name: name for name in own if name in stored}
    rest: dict[str, list[str]] = {}
    for name in stored.keys() - pairs.keys():
        rest.setdefault(canonical_name(name), []).append(name)
    alone: dict[str, list[str]] = {}
    for name in own.keys() - pairs.keys():
        alone.setdefault(canonical_name(name), []).append(name)
    for short, names in alone.items():
        candidates = rest.get(short, ())
        if len(candidates) == len(names) == 1:
            pairs[names[0]] = candidates[0]
    return pairs
