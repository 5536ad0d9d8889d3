"""What arrives is bit by bit what was sent: everything that can be saved, in place and new."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from asyncdcp import PerRank
from asyncdcp.errors import PeerFailed, StateMismatch
from asyncdcp.metadata import DTYPE_SIZES
from asyncdcp.transport.stream import plan_stream
from tests.checkpointer.test_roundtrip import views
from tests.transport.conftest import BOTH_WAYS, LONG, TINY, World, brought, empty_like

Same = Callable[[Any, Any], bool]


def bits(state: Any) -> Any:
    """Every tensor as dtype, shape and bytes."""
    if isinstance(state, Tensor):
        plain = state.resolve_conj().resolve_neg()
        if plain.dtype.itemsize == 1:
            plain = plain.view(torch.uint8)
        elif not plain.dtype.is_floating_point and not plain.dtype.is_complex:
            plain = plain.view(getattr(torch, f"int{8 * plain.dtype.itemsize}"))
        packed = plain.contiguous().as_strided((plain.numel(),), (1,))
        return state.dtype, state.shape, packed.view(torch.uint8).tolist()
    return {key: bits(value) for key, value in state.items()}


def strided(state: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Targets of the same shapes whose memory is not packed."""

    def target(tensor: Tensor) -> Tensor:
        wide = torch.empty((*tensor.shape, 3), dtype=tensor.dtype)
        return wide[..., 1]

    return {dtype: {name: target(tensor) for name, tensor in group.items()} for dtype, group in state.items()}


LARGE = torch.zeros(TINY.buffer_bytes // 4 + 1)
"""With it a state is larger than the buffers."""


@BOTH_WAYS
def test_every_dtype_and_view_comes_new_and_in_place(world: World) -> None:
    _, transports = world()
    state = {**{dtype: views(dtype) for dtype in DTYPE_SIZES}, "large": {"zeros": LARGE}}
    expected = bits(state)
    assert bits(brought(transports, state)) == expected
    for target in (empty_like(state), strided(state)):
        kept = target["float32"]["transposed"]
        assert bits(brought(transports, state, target)) == expected
        assert target["float32"]["transposed"] is kept


def _distinct(mapping: dict[Any, Any]) -> bool:
    return len({str(key) for key in mapping}) == len(mapping)


_leaves = st.one_of(
    st.builds(
        lambda shape, dtype: torch.full(shape, 3).to(dtype),
        st.lists(st.integers(0, 40), max_size=3),
        st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float8_e5m2]),
    ),
    st.builds(lambda n: torch.arange(4 * n).view(4, n)[:, ::2], st.integers(0, 700)),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4),
)
_states = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text("abc", min_size=1, max_size=3) | st.integers(), inner, max_size=4).filter(_distinct),
        st.lists(inner, max_size=2).map(tuple),
    ),
    max_leaves=12,
)


@BOTH_WAYS
@settings(derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=_states.filter(lambda state: state is not None))
def test_any_state_arrives(world: World, way: str, same: Same, state: Any) -> None:
    if not hasattr(world, "pair"):
        world.pair = world()[1]  # type: ignore[attr-defined]  # one pair for all examples
    if way == "shared":
        state = [state, LARGE]
    assert same(brought(world.pair, state), _packed(state))  # type: ignore[attr-defined]  # as above


def _packed(state: Any) -> Any:
    """What a new state holds: strides are not kept."""
    if isinstance(state, Tensor):
        return state.contiguous()
    if isinstance(state, dict):
        return {key: _packed(value) for key, value in state.items()}
    return type(state)(_packed(value) for value in state) if isinstance(state, (list, tuple)) else state


def test_a_training_state_goes_on_at_the_receiver_as_at_the_sender(world: World, same: Same) -> None:
    def program(seed: int, steps: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 300), nn.BatchNorm1d(300), nn.Linear(300, 8))
        model[2].weight.data = torch.randn(8, 300)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        state = {"model": model, "optimizer": optimizer, "tied": [model[0].weight], "rng": PerRank({"seed": seed})}
        for _ in range(steps):
            train(state)
        return state

    def train(state: dict[str, Any]) -> Tensor:
        state["optimizer"].zero_grad()
        loss: Tensor = state["model"](torch.ones(4, 8) * torch.arange(4.0)[:, None]).square().mean()
        loss.backward()
        state["optimizer"].step()
        return loss.detach()

    _, transports = world()
    healthy, fresh = program(1, 3), program(2, 0)
    weight = fresh["model"][0].weight
    assert brought(transports, healthy, fresh) is fresh
    assert fresh["model"][0].weight is weight
    assert fresh["tied"][0].data_ptr() == weight.data_ptr()
    assert fresh["rng"].value == {"seed": 1}
    assert [train(fresh) for _ in range(3)] == [train(healthy) for _ in range(3)]
    assert same(fresh["model"].state_dict(), healthy["model"].state_dict())


def test_small_targets_of_every_kind_are_filled_together(world: World, same: Same) -> None:
    """Parameters, inference tensors, matrices, scalars, one that is not packed, one of which nobody knows."""
    with torch.inference_mode():
        inference = torch.zeros(5)
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    into = {
        "a": torch.zeros(7),
        "inference": inference,
        "parameter": parameter,
        "scalar": torch.tensor(0.0),
        "strided": torch.zeros(4, 3).t(),
        "ints": [torch.zeros(n, dtype=torch.int64) for n in range(9)],
        "last": torch.zeros(3),
    }
    state = {
        "a": torch.rand(7),
        "inference": torch.rand(5),
        "parameter": torch.rand(3, 2),
        "scalar": torch.tensor(3.5),
        "strided": torch.rand(3, 4),
        "ints": [torch.arange(n) for n in range(9)],
        "last": torch.rand(3),
    }
    _, [sender, receiver] = world()
    for _ in range(2):
        send = sender.send_checkpoint([1], state)
        assert receiver.recv_checkpoint(0, into).result(LONG)["parameter"] is parameter
        send.result(LONG)
        assert same(into, {**state, "parameter": parameter})
        assert torch.equal(parameter.detach(), state["parameter"])  # type: ignore[arg-type]  # of the dict's values
        assert parameter.requires_grad
        state["a"] += 1  # type: ignore[operator]  # likewise


_TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "packed": torch.zeros_like,
    "strided": lambda tensor: torch.zeros(*tensor.shape, 2)[..., 1],
    "parameter": lambda tensor: nn.Parameter(torch.zeros_like(tensor)),
}


@pytest.mark.parametrize(("rows", "way"), [(3, "group"), (900, "group"), (9000, "group"), (9000, "shared")])
def test_what_is_tied_at_the_sender_fills_targets_that_are_not(world: World, rows: int) -> None:
    """Two and three targets of every kind and order for one tensor that is sent: packed with others, in one block of
    its own, in many.
    """
    _, transports = world()
    tied = torch.randn(rows, 8)
    state = {"before": torch.randn(5), "a": tied, "b": tied, "c": tied, "same": torch.randn(7)}
    for kinds in itertools.product(_TARGETS, repeat=3):
        into = {name: _TARGETS[kind](tied) for name, kind in zip("abc", kinds, strict=True)}
        everything = {"before": torch.zeros(5), **into, "same": torch.zeros(7)}
        if rows == 3:
            del everything["c"]
            everything["c"] = everything["b"]  # partly tied
        brought(transports, state, everything)
        for name, tensor in everything.items():
            assert torch.equal(tensor.detach(), state[name]), (name, kinds)


def test_an_equal_structure_is_planned_once(world: World) -> None:
    _, transports = world()
    brought(transports, OrderedDict(w=torch.ones(3)))
    [before] = transports[0]._streams._streams
    brought(transports, OrderedDict(w=torch.zeros(3)))
    assert transports[0]._streams._streams == (before,)
    assert plan_stream(before.plan.structure, TINY.block_bytes).encoded == before.encoded


# ── DTensors ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def meshed() -> Iterator[Callable[[int], Any]]:
    """A mesh of 2 × 2, as seen by one of its ranks."""

    def on(rank: int) -> Any:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        return init_device_mesh("cpu", (2, 2))

    yield on
    if dist.is_initialized():
        dist.destroy_process_group()


def test_shards_go_to_the_replica_that_holds_the_same(world: World, meshed: Callable[[int], Any]) -> None:
    full = torch.randn(7, 6)
    for placements in ([Replicate(), Shard(0)], [Shard(0), Shard(1)], [Shard(1), Replicate()]):
        _, transports = world()
        mesh = meshed(3)
        source = {"w": distribute_tensor(full, mesh, placements, src_data_rank=None)}
        target = {"w": distribute_tensor(torch.zeros(7, 6), mesh, placements, src_data_rank=None)}
        local = target["w"].to_local()
        brought(transports, source, target)
        assert torch.equal(local, source["w"].to_local())
        assert list(target["w"].placements) == placements


def test_a_shard_that_the_sender_does_not_hold_is_refused_on_both_sides(
    world: World, meshed: Callable[[int], Any]
) -> None:
    _, [sender, receiver] = world()
    full = torch.randn(8, 6)
    source = {"w": distribute_tensor(full, meshed(0), [Replicate(), Shard(0)], src_data_rank=None)}
    send = sender.send_checkpoint([1], source)
    error = receiver.recv_checkpoint(0, {"w": torch.zeros(8, 6)}).exception(LONG)
    assert isinstance(error, StateMismatch)
    assert "holds 24 of the 48 elements of w" in str(error)
    assert isinstance(send.exception(LONG), PeerFailed)


def test_a_state_that_was_received_is_not_kept(world: World) -> None:
    _, transports = world()
    state = brought(transports, {"w": torch.ones(3)})
    transports[1]._engine.submit(anyio.lowlevel.checkpoint).result(LONG)  # a turn of the loop, and no verb
    gone = weakref.ref(state["w"])
    del state
    gc.collect()
    assert gone() is None


def test_an_error_does_not_keep_the_state_that_was_to_be_received(world: World) -> None:
    _, [sender, receiver] = world()
    send = sender.send_checkpoint([1], {"w": torch.ones(3)})
    into = {"w": torch.ones(4)}
    error = receiver.recv_checkpoint(0, into).exception(LONG)
    assert isinstance(error, StateMismatch)
    assert send.exception(LONG) is not None
    receiver._engine.submit(anyio.lowlevel.checkpoint).result(LONG)  # a turn of the loop, and no verb
    gone = weakref.ref(into["w"])
    del into
    gc.collect()
    assert gone() is None
