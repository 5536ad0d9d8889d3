"""A send beside the training: its staging, the guard, what is torn, its progress and its bounds."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
import trio
from torch import nn

from asyncdcp import Progress
from asyncdcp.errors import PeerFailed, TornSnapshotError
from asyncdcp.transport import ReceiveReport, SendReport, TransportOptions
from tests.transport.conftest import BOTH_WAYS, LONG, TINY, Held, World, empty_like

Same = Callable[[Any, Any], bool]


@BOTH_WAYS
def test_one_staging_serves_several(world: World, way: str, same: Same) -> None:
    _, transports = world(4)
    state = {"w": torch.randn(200_000), "many": [torch.full((100,), float(n)) for n in range(500)], "n": 5}
    send = transports[0].send_checkpoint([3, 1, 2], state)
    futures = [
        transports[rank].recv_checkpoint(0, into) for rank, into in ((1, None), (2, empty_like(state)), (3, None))
    ]
    for future in futures:
        assert same(future.result(LONG), state)
    report = send.result(LONG)
    assert isinstance(report, SendReport)
    assert report.ranks == (3, 1, 2)
    assert report.bytes == 200_000 * 4 + 500 * 400
    assert send.staged.done()
    told = futures[1].report
    assert isinstance(told, ReceiveReport)
    assert told.shared == (way == "shared")
    assert told.in_place_bytes == (0 if told.shared else 800_000)
    assert told.bytes == report.bytes
    assert told.bytes_per_second > 0


def test_a_whole_staging_frees_the_state_before_anybody_receives(world: World, same: Same) -> None:
    _, transports = world(options=TransportOptions(buffer_bytes=1 << 16, staging="whole"))
    state = {"w": torch.randn(100_000), "s": torch.randn(30)}
    before = copy.deepcopy(state)
    send = transports[0].send_checkpoint([1], state)
    send.staged.result(LONG)
    state["w"].zero_()
    assert same(transports[1].recv_checkpoint(0).result(LONG), before)
    send.result(LONG)


def test_in_a_trio_program(world: World, same: Same) -> None:
    async def main() -> None:
        _, [sender, receiver] = world()
        state = {"w": torch.randn(1000), "n": 5}
        send = sender.send_checkpoint([1], state)
        assert same(await receiver.recv_checkpoint(0), state)
        await send

    trio.run(main)


@BOTH_WAYS
@pytest.mark.parametrize("place", ["_streams.get", "_engine.submit", "_outstanding.add"])
def test_a_signals_handler_may_send_in_the_middle_of_a_send(
    world: World, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    _, (sender, *others) = world(3)
    owner, name = attrgetter(place.rpartition(".")[0])(sender), place.rpartition(".")[2]
    function, sends = getattr(owner, name), []

    def interrupted(*args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        sends.append(sender.send_checkpoint([1], {"n": 1}))  # on the same thread, as a handler is run
        return function(*args, **options)

    monkeypatch.setattr(owner, name, interrupted)
    sends.append(sender.send_checkpoint([2], {"n": 2}))
    assert [other.recv_checkpoint(0).result(LONG)["n"] for other in others] == [1, 2]
    assert [send.result(LONG).ranks for send in sends] == [(1,), (2,)]


def test_a_guarded_step_waits_until_the_state_is_sent(world: World, same: Same) -> None:
    _, transports = world()
    parameter = nn.Parameter(torch.ones(50_000))
    average = torch.ones(10)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones_like(parameter)
    stepped = threading.Event()
    with transports[0].guard(optimizer) as guard:
        send = transports[0].send_checkpoint([1], {"p": parameter, "average": average})
        average.zero_()  # cloned at the call: nobody guards it
        step = threading.Thread(
            target=lambda: [optimizer.step(), stepped.set()]  # type: ignore[func-returns-value]  # one after the other
        )
        step.start()
        assert not stepped.wait(0.05)
        found = transports[1].recv_checkpoint(0).result(LONG)
        assert stepped.wait(LONG)
        assert guard.waited > 0
    step.join()
    send.result(LONG)
    assert same(found, {"p": torch.ones(50_000), "average": torch.ones(10)})
    assert bool((parameter == 0).all())


def test_a_step_that_waits_too_long_drops_the_send(world: World) -> None:
    _, transports = world(timeout=0.3, options=TransportOptions(buffer_bytes=1 << 16, guard_deadline=0.05))
    parameter = nn.Parameter(torch.ones(50_000))
    parameter.grad = torch.ones_like(parameter)
    with transports[0].guard(optimizer := torch.optim.SGD([parameter], lr=1.0)):
        send = transports[0].send_checkpoint([1], {"p": parameter})
        optimizer.step()
        assert send.exception(LONG) is not None


def test_a_change_during_the_send_is_found(world: World) -> None:
    """Of what is sent already, and of what is not staged yet."""
    changed = threading.Event()
    _, [sender, receiver] = world(link=lambda link: Held(link, changed))
    state = {f"w{n}": torch.zeros(1000) for n in range(100)}

    def change(progress: Progress) -> None:
        state["w99"].fill_(1)
        state["w0"].fill_(1)
        changed.set()

    send = sender.send_checkpoint([1], state, on_progress=change)
    received = receiver.recv_checkpoint(0, empty_like(state))
    error, other = send.exception(LONG), received.exception(LONG)
    assert isinstance(error, TornSnapshotError)
    assert set(error.tensors) == {"w0", "w99"}
    assert isinstance(other, PeerFailed)


@BOTH_WAYS
def test_a_tensor_that_changed_before_the_end_fails_both(world: World) -> None:
    _, [sender, receiver] = world()
    state = {"a": torch.zeros(50_000), "b": torch.zeros(10)}
    send = sender.send_checkpoint([1], state)
    while not sender._link._hub._sends[(0, 1, 0xADC0)]:  # type: ignore[attr-defined]  # the offer is out
        pass
    state["a"].add_(1)
    received = receiver.recv_checkpoint(0)
    error, other = send.exception(LONG), received.exception(LONG)
    assert isinstance(error, TornSnapshotError)
    assert error.tensors == ("a",)
    assert isinstance(other, PeerFailed)
    assert "a; wait for staged" in str(other)


@BOTH_WAYS
def test_progress_comes_to_the_end(world: World) -> None:
    _, [sender, receiver] = world()
    told: dict[str, list[Progress]] = {"send": [], "receive": []}
    state = {"w": torch.zeros(40_000), "many": [torch.zeros(10) for _ in range(20)]}
    send = sender.send_checkpoint([1], state, on_progress=lambda p: told["send"].append(p))
    receiver.recv_checkpoint(0, on_progress=lambda p: told["receive"].append(p)).result(LONG)
    send.result(LONG)
    sender.close()
    receiver.close()
    for stage, reports in told.items():
        assert reports[-1] == (stage, 160_800, 160_800)


def test_a_small_buffer_bounds_what_a_transfer_holds(world: World) -> None:
    """Blocks of both sides, and tensors of any size go through them."""
    _, [sender, receiver] = world(options=TINY)
    state = {"t": torch.randn(300, 400).t(), "s": [torch.randn(90) for _ in range(900)]}
    send = sender.send_checkpoint([1], state)
    held: list[int] = []
    task = receiver.recv_checkpoint(0, {"t": torch.zeros(300, 400).t(), "s": [torch.zeros(90) for _ in range(900)]})
    task.result(LONG)
    send.result(LONG)
    stream = sender._streams.get(sender._structures._seen[0].structure)
    held = [block.length for block in stream.blocks]
    assert max(held) <= TINY.block_bytes
    assert max(len(batch) for batch in stream.batches) * 2 * TINY.block_bytes <= TINY.buffer_bytes
