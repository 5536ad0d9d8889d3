"""What two ranks do not agree on, and calls that make no sense: refused before anything moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from asyncdcp.errors import Closed, InvalidOption, PeerFailed, StateMismatch, UnsupportedValue
from asyncdcp.transport import MemoryHub, PGTransport, TransportOptions, wire
from tests.transport.conftest import LONG, World, brought

Same = Callable[[Any, Any], bool]


@pytest.mark.parametrize(
    ("into", "said"),
    [
        ({"w": torch.zeros(3), "n": 0}, "w: shape [3] in the state, [2] in the checkpoint"),
        ({"w": torch.zeros(2, dtype=torch.int32), "n": 0}, "w: dtype int32 in the state, float32 in the checkpoint"),
        ({"w": torch.zeros(2)}, "unexpected (only in the checkpoint): 1"),
        ({"w": torch.zeros(2), "n": 0, "more": 1}, "missing in the checkpoint: 1"),
        ({"w": torch.zeros(1).expand(2), "n": 0}, "w: some of its elements in the state share memory"),
        ({"w": torch.zeros(2, device="meta"), "n": 0}, "w: on the meta device: call to_empty()"),
    ],
)
def test_a_mismatch_is_told_on_both_sides_before_anything_moves(world: World, into: Any, said: str) -> None:
    hub, [sender, receiver] = world()
    before = into["w"].clone()
    send = sender.send_checkpoint([1], {"w": torch.ones(2), "n": 1})
    error = receiver.recv_checkpoint(0, into).exception(LONG)
    assert isinstance(error, StateMismatch)
    assert said in str(error)
    assert "receive it without into=" in str(error)
    assert not any(option in str(error) for option in ("cast=", "strict=", "rename=", "assign=")), "of a load"
    other = send.exception(LONG)
    assert isinstance(other, PeerFailed)
    assert other.rank == 1
    assert said in str(other)
    assert into["w"].is_meta or torch.equal(into["w"], before)
    assert hub.moved == 4, "an offer and an answer, heads and bodies"
    assert brought([sender, receiver], {"w": torch.ones(2)})["w"].tolist() == [1, 1], "both can go on"


def test_a_target_whose_elements_overlap_is_refused(world: World) -> None:
    """Also where all else is just as at the sender."""
    _, [sender, receiver] = world()
    windows = torch.zeros(8).unfold(0, 4, 2)
    send = sender.send_checkpoint([1], {"w": torch.arange(12.0).view(3, 4)})
    error = receiver.recv_checkpoint(0, {"w": windows}).exception(LONG)
    assert isinstance(error, StateMismatch)
    assert "share memory" in str(error)
    assert isinstance(send.exception(LONG), PeerFailed)


def test_one_that_refuses_does_not_stop_the_others(world: World, same: Same) -> None:
    _, transports = world(3)
    state = {"w": torch.randn(50_000)}
    send = transports[0].send_checkpoint([1, 2], state)
    refused = transports[1].recv_checkpoint(0, {"v": 1})
    assert same(transports[2].recv_checkpoint(0).result(LONG), state)
    assert isinstance(refused.exception(LONG), StateMismatch)
    error = send.exception(LONG)
    assert isinstance(error, PeerFailed)
    assert error.rank == 1


def test_one_that_waits_for_another_rank_is_not_overtaken(world: World) -> None:
    """Rank 2 is free while a send to it still waits for rank 1: a later one to it alone comes later nevertheless."""
    _, [sender, first, second] = world(3)
    sends = [sender.send_checkpoint(ranks, {"version": n}) for n, ranks in enumerate(([1], [1, 2], [2]), 1)]
    waits = second.recv_checkpoint(0)
    assert [first.recv_checkpoint(0).result(LONG)["version"] for _ in range(2)] == [1, 2]
    assert [each.result(LONG)["version"] for each in (waits, second.recv_checkpoint(0))] == [2, 3]
    for send in sends:
        send.result(LONG)


def test_what_cannot_be_sent_is_refused_at_the_call(world: World) -> None:
    _, [sender, _] = world()
    with pytest.raises(UnsupportedValue, match="x"):
        sender.send_checkpoint([1], {"x": object()})
    for ranks in ([], [0], [1, 1], [2]):
        with pytest.raises(InvalidOption, match="other ranks of the group"):
            sender.send_checkpoint(ranks, {})
    with pytest.raises(InvalidOption):
        sender.recv_checkpoint(0)
    sender.close()
    with pytest.raises(Closed):
        sender.send_checkpoint([1], {})


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), True, "3"])
def test_wrong_timeouts(timeout: Any) -> None:
    with pytest.raises(InvalidOption, match="timeout"):
        PGTransport(MemoryHub(2).link(0), timeout=timeout)


def test_wrong_options() -> None:
    for words in (
        {"buffer_bytes": 100},
        {"staging": "none"},
        {"eager_bytes": -1},
        {"guard_deadline": 0},
        {"guard_deadline": "1"},
    ):
        with pytest.raises(InvalidOption, match=next(iter(words))):
            TransportOptions(**words)
    for group in ("gloo", dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(InvalidOption, match="process group"):
            PGTransport(group, timeout=1)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(InvalidOption, match="no default one"):
        PGTransport(None, timeout=1)


@pytest.mark.parametrize("ranks", [1, "1", [1.0], [[1]], None])
def test_what_is_no_list_of_ranks_is_refused(world: World, ranks: Any) -> None:
    _, [sender, _] = world()
    with pytest.raises(InvalidOption, match="takes ranks"):
        sender.send_checkpoint(ranks, {"n": 1})


def test_blocks_are_never_larger_than_a_receiver_takes() -> None:
    assert TransportOptions(buffer_bytes=64 << 30).block_bytes == wire.BLOCK_LIMIT
