"""Which entries of a state a checkpoint can fill; every mismatch is found and listed before a byte is read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from torch import Tensor

from asyncdcp.errors import StateMismatch
from asyncdcp.metadata import Metadata, TensorStorageMetadata
from asyncdcp.state_dict.flatten import FlatState
from asyncdcp.state_dict.structure import DTYPE_NAMES

_SHOWN = 20


def match(flat: FlatState, metadata: Metadata, *, strict: bool) -> dict[str, list[Tensor]]:
    """The targets for each stored tensor: usually one; more where the state is untied and the checkpoint tied.

    ``StateMismatch`` if shapes, dtypes or kinds differ, and with ``strict`` also if one side has a name that the other
    lacks.
    """
    stored = metadata.state_dict_metadata
    wanted: dict[str, Tensor] = {**flat.tensors, **{alias: flat.tensors[name] for alias, name in flat.aliases.items()}}
    have = {*stored, *metadata.aliases}
    want = {*wanted, *flat.values}
    missing = sorted(want - have) if strict else []
    unexpected = sorted(have - want) if strict else []
    mismatched: dict[str, str] = {}
    found: dict[str, list[Tensor]] = {}
    for name, tensor in wanted.items():
        origin = metadata.aliases.get(name, name)
        if origin in stored:
            problem = _difference(tensor, stored[origin])
            if problem:
                mismatched[name] = problem
            targets = found.setdefault(origin, [])
            if not any(tensor is other for other in targets):
                targets.append(tensor)
    for name in flat.values:
        if isinstance(stored.get(metadata.aliases.get(name, name)), TensorStorageMetadata):
            mismatched[name] = "a plain value in the state, a tensor in the checkpoint"
    if missing or unexpected or mismatched:
        raise _mismatch(metadata.storage_meta.checkpoint_id, missing, unexpected, mismatched)
    return found


def _difference(tensor: Tensor, stored: object) -> str | None:
    if not isinstance(stored, TensorStorageMetadata):
        return "a tensor in the state, a plain value in the checkpoint"
    dtype, shape = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
    if shape != stored.size:
        return f"shape {list(shape)} in the state, {list(stored.size)} in the checkpoint"
    if dtype != stored.properties.dtype:
        return f"dtype {dtype} in the state, {stored.properties.dtype} in the checkpoint"
    return None


def _mismatch(
    path: str, missing: Sequence[str], unexpected: Sequence[str], mismatched: Mapping[str, str]
) -> StateMismatch:
    lines = [f"the state does not match the checkpoint at {path} (nothing was read):"]
    lines += _listed("missing in the checkpoint", missing, unexpected)
    lines += _listed("unexpected (only in the checkpoint)", unexpected, ())
    lines += _listed("different", [f"{name}: {problem}" for name, problem in mismatched.items()], ())
    if missing or unexpected:
        lines.append("  strict=False loads what both have and leaves the rest alone")
    return StateMismatch(
        "\n".join(lines), path=path, missing=missing, unexpected=unexpected, mismatched=list(mismatched)
    )


def _listed(title: str, names: Sequence[str], candidates: Sequence[str]) -> list[str]:
    if not names:
        return []
    lines = [f"  {title}: {len(names)}"]
    for name in names[:_SHOWN]:
        near = difflib.get_close_matches(name, candidates, n=1)
        lines.append(f"    {name}" + (f"  (did you mean {near[0]}?)" if near else ""))
    if len(names) > _SHOWN:
        lines.append(f"    … and {len(names) - _SHOWN} more (all are in the error's fields)")
    return lines
