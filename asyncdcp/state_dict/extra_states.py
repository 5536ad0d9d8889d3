"""What modules store of their own (``get_extra_state``): whatever a checkpoint has is given to ``set_extra_state``, as
torch does. So for these entries the checkpoint decides, where both sides have one.
"""

from __future__ import annotations

import re

_ROOT = re.compile(r"(?:.*?\.)?_extra_state(?=[.#]|$)", re.DOTALL)


def is_extra_state(key: object) -> bool:
    """Whether a dict's key is one under which a module's ``state_dict()`` has what ``get_extra_state`` gave."""
    return isinstance(key, str) and (key == "_extra_state" or key.endswith("._extra_state"))


def extra_state_of(name: str) -> str | None:
    """The FQN of the extra state to which ``name`` belongs, or that it is; None if it is of none."""
    found = _ROOT.match(name)
    return None if found is None else found[0]
