"""What is said of a state and a checkpoint that do not match."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from asyncdcp.errors import StateMismatch

_SHOWN = 20
_WAYS_OUT = "  strict=False loads what both have and leaves the rest alone; rename= pairs other names"
_BY_HAND = "  receive it without into=, as a new state, and take what fits from that"


def mismatch(
    path: str, missing: Sequence[str], unexpected: Sequence[str], different: Mapping[str, str], *, options: bool
) -> StateMismatch:
    """The error that lists all that was found, with near misses; for ``different`` names, what differs. ``options``:
    whether there are those of a load.
    """
    lines = [f"the state does not match the checkpoint at {path} (nothing was read):"]
    lines += _listed("missing in the checkpoint", missing, unexpected)
    lines += _listed("unexpected (only in the checkpoint)", unexpected, ())
    lines += _listed("different", [f"{name}: {problem}" for name, problem in different.items()], ())
    if not options:
        lines.append(_BY_HAND)
    elif missing or unexpected:
        lines.append(_WAYS_OUT)
    return StateMismatch(
        "\n".join(lines), path=path, missing=missing, unexpected=unexpected, mismatched=list(different)
    )


def nothing_chosen(path: str, keys: Sequence[str]) -> StateMismatch:
    """The error for ``keys`` that choose nothing of a checkpoint, where no state is given."""
    name = ", ".join(keys)
    lines = [f"the call does not match the checkpoint at {path} (nothing was read):"]
    lines += _listed("different", [f"{name}: keys that match nothing in the checkpoint"], ())
    return StateMismatch("\n".join(lines), path=path, mismatched=[name])


def unexpected_everywhere(path: str, names: Sequence[str]) -> StateMismatch:
    """The error for what is in the checkpoint and in no rank's state."""
    lines = [f"the states of all ranks together do not match the checkpoint at {path} (nothing was read):"]
    lines += _listed("unexpected (only in the checkpoint)", names, ())
    lines.append(_WAYS_OUT)
    return StateMismatch("\n".join(lines), path=path, unexpected=names)


def _listed(title: str, names: Sequence[str], candidates: Iterable[str]) -> list[str]:
    if not names:
        return []
    pool = list(candidates)
    lines = [f"  {title}: {len(names)}"]
    for name in names[:_SHOWN]:
        near = difflib.get_close_matches(name, pool, n=1)
        lines.append(f"    {name}" + (f"  (did you mean {near[0]}?)" if near else ""))
    if len(names) > _SHOWN:
        lines.append(f"    … and {len(names) - _SHOWN} more (all are in the error's fields)")
    return lines
