"""Any state through the real checkpointer, made anew and in place: what comes back is what went in, types included."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from asyncdcp import MemoryStorage, PerRank
from asyncdcp.errors import DuplicateName, StateMismatch
from asyncdcp.state_dict.flatten import flatten, is_plain_sequence

_ROUND = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)


class Box:
    """A Stateful for which the checkpoint decides."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def state_dict(self) -> Any:
        return self.content

    def load_state_dict(self, state_dict: Any) -> None:
        self.content = state_dict


# ── tensors ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.complex128, torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool),
]
_LAYOUTS = ["plain", "transposed", "stepped", "expanded", "inside", "mixed", "conj", "neg", "parameter", "inference"]


def content(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bytes, so that floats are of all kinds."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype is torch.bool else 256
    raw = torch.randint(high, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def tensor(shape: list[int], dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """A tensor of about this shape, laid out in memory in one of the ways that there are."""
    made = content(shape, dtype, seed)
    if layout == "transposed" and shape:
        return made.transpose(0, -1)
    if layout == "stepped" and shape:
        return content([2 * shape[0], *shape[1:]], dtype, seed)[::2]
    if layout == "inside" and shape:
        return content([shape[0] + 3, *shape[1:]], dtype, seed)[2:-1]
    if layout == "mixed" and shape:
        doubled = content([2 * size + 1 for size in reversed(shape)], dtype, seed)
        return doubled.permute(*reversed(range(len(shape))))[(slice(1, None, 2),) * len(shape)]
    if layout == "expanded":
        return made.unsqueeze(0).expand(2, *shape)
    if layout == "conj" and dtype.is_complex:
        return made.conj()
    if layout == "neg" and dtype.is_complex:
        return made.conj().imag
    if layout == "parameter":
        return nn.Parameter(made, requires_grad=False)
    if layout == "inference":
        with torch.inference_mode():
            return made.clone()
    return made


_tensors = st.builds(
    tensor,
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(_DTYPES),
    st.sampled_from(_LAYOUTS),
    st.integers(0, 3),
)

# ── states ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_values = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(max_size=4)),
    st.binary(max_size=4),
    st.sampled_from([torch.Size([2, 3]), torch.float16, torch.device("cpu"), np.float32(2.5), {1, 2}, frozenset("a")]),
    st.builds(np.arange, st.integers(0, 4)),
    st.builds(deque, st.lists(st.integers(), max_size=3)),
    st.builds(Counter, st.text("ab", max_size=4)),
    st.lists(st.integers() | st.lists(st.floats(), max_size=2).map(tuple), max_size=3),
)
_keys = st.one_of(
    st.text("abé_", min_size=1, max_size=3),
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.just(1.5),
    st.just((1, "a")),
)


def _dicts(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pairs = st.lists(st.tuples(_keys, inner), max_size=4, unique_by=lambda pair: str(pair[0]))
    return pairs.flatmap(lambda found: st.sampled_from([dict(found), OrderedDict(found), defaultdict(list, found)]))


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    items = st.lists(inner, max_size=3)
    return st.one_of(_dicts(inner), items, items.map(tuple), inner.map(PerRank), _dicts(inner).map(Box))


@st.composite
def states(draw: st.DrawFn) -> dict[Any, Any]:
    """Nested states of a few tensors, some of which stand in them more than once."""
    pool = draw(st.lists(_tensors, min_size=1, max_size=4))
    pool += [pool[0].detach(), pool[0].reshape(-1)[:2]]  # tied, and a part of it
    leaves = st.sampled_from(pool) | _values
    nested = draw(st.recursive(leaves, _containers, max_leaves=10))
    state = {"x": nested, "y": draw(st.sampled_from(pool))}
    try:
        flatten(state)
    except DuplicateName:
        assume(False)
    return state


def walk(
    state: Any, leaf: Callable[[Any], Any], box: Callable[[Box], Any], own: Callable[[Any], Any] = lambda held: held
) -> Any:
    """The state with other leaves; a PerRank is what ``own`` makes of what it holds."""
    if isinstance(state, Box):
        return box(state)
    if isinstance(state, PerRank):
        return own(walk(state.value, leaf, box, own))
    if isinstance(state, dict) and not isinstance(state, Counter):
        made = defaultdict(state.default_factory) if isinstance(state, defaultdict) else type(state)()
        made.update({key: walk(value, leaf, box, own) for key, value in state.items()})
        return made
    if type(state) in (list, tuple) and not is_plain_sequence(state):
        return type(state)(walk(value, leaf, box, own) for value in state)
    return leaf(state)


def expected(state: Any) -> Any:
    """What a load gives: plain tensors, and what Statefuls hold."""
    return walk(state, _plain, lambda box: expected(box.content))


def _plain(value: Any) -> Any:
    return value.detach().as_subclass(Tensor) if isinstance(value, Tensor) else value


def tensors_of(state: Any) -> list[Tensor]:
    found: list[Tensor] = []
    walk(state, lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None, lambda box: None)
    return found


def ties(state: Any) -> list[tuple[int, ...]]:
    """Which tensors, by number, are one: of the same memory in the same way; empty ones never are."""
    groups: dict[Any, list[int]] = {}
    for number, each in enumerate(tensors_of(state)):
        view = (each.data_ptr(), each.shape, each.stride(), each.dtype, each.is_conj(), each.is_neg())
        groups.setdefault(view if each.numel() else number, []).append(number)
    return sorted(map(tuple, groups.values()))


# ── tests ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@_ROUND
@given(state=states())
def test_anew(checkpointer, same, state):
    storage = MemoryStorage()
    checkpointer.save(storage, state)
    loaded = checkpointer.load(storage)
    wanted = expected(state)
    assert same(loaded, wanted)
    assert ties(loaded) == ties(wanted)
    assert len({each.untyped_storage().data_ptr() for each in tensors_of(loaded) if each.numel()}) == len(
        [group for group in ties(loaded) if tensors_of(loaded)[group[0]].numel()]
    ), "what only overlapped shares no memory"


def blank(state: Any, strided: bool, half: bool) -> Any:
    """A target: of the same containers and kinds of tensors, with other content; ``half`` leaves Statefuls empty."""
    made: dict[int, Tensor] = {}

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return [] if type(value) is list else "another"
        if id(value) not in made:
            other = torch.zeros(value.shape[::-1], dtype=value.dtype).permute([*reversed(range(value.ndim))])
            made[id(value)] = other if strided else other.contiguous()
        return made[id(value)]

    return walk(state, leaf, lambda box: Box({} if half else blank(box.content, strided, half)), PerRank)


@_ROUND
@given(state=states(), strided=st.booleans(), half=st.booleans())
def test_in_place(checkpointer, same, state, strided, half):
    target = blank(state, strided, half)
    tensors = tensors_of(target)
    checkpointer.save(storage := MemoryStorage(), state)
    assert checkpointer.load(storage, target) is target
    assert all(a is b for a, b in zip(tensors_of(target), tensors, strict=True))
    loaded = walk(target, lambda leaf: leaf, lambda box: expected(box.content))
    assert same(loaded, expected(state))


def test_a_target_whose_elements_share_memory_is_refused(checkpointer):
    checkpointer.save(storage := MemoryStorage(), {"x": torch.ones(3, 2)})
    with pytest.raises(StateMismatch, match=r"x: some of its elements in the state share memory.*clone"):
        checkpointer.load(storage, {"x": torch.zeros(3, 1).expand(3, 2)})
