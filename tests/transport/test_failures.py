"""What goes wrong: a side that dies at any point, one that does nothing, damage, what nobody looked at."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from asyncdcp.errors import ChecksumMismatch, PeerFailed, UnseenFailure
from asyncdcp.transport import MemoryHub, PGTransport
from asyncdcp.transport.blocks import Stager
from asyncdcp.transport.endpoint import Endpoint
from asyncdcp.transport.landing import Landing
from asyncdcp.transport.link import Link, LinkError, Pending
from tests.transport.conftest import BOTH_WAYS, LONG, STATE, TINY, World, empty_like


class Loads:
    """A Stateful that says whether it was given something."""

    def __init__(self) -> None:
        self.loaded = False

    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = True


def buffers_of_a_transfer(world: World) -> int:
    hub, [sender, receiver] = world()
    send = sender.send_checkpoint([1], STATE)
    receiver.recv_checkpoint(0).result(LONG)
    send.result(LONG)
    return hub.moved


@BOTH_WAYS
@pytest.mark.parametrize("dies", [0, 1])
def test_either_side_dies_at_any_point(world: World, way: str, dies: int) -> None:
    """The other fails, or had all it needed; nobody waits for the timeout."""
    total = buffers_of_a_transfer(world)
    assert total > 40 if way == "group" else total == 16
    for point in sorted({*range(0, 9), *range(9, total - 5, 7), *range(total - 5, total)}):
        hub, [sender, receiver] = world()

        def die(source: int, target: int, buffer: Tensor, hub: MemoryHub = hub, point: int = point) -> None:
            if hub.moved >= point:
                hub.lose(dies)

        hub.tamper = die
        stateful = Loads()
        begun = time.monotonic()
        send = sender.send_checkpoint([1], {**STATE, "s": Loads()})
        received = receiver.recv_checkpoint(0, {**STATE, "s": stateful})
        errors = [send.exception(LONG), received.exception(LONG)]
        assert time.monotonic() - begun < LONG / 2
        survivor = errors[1 - dies]
        if point < total - 2:
            assert isinstance(survivor, PeerFailed)
            assert survivor.rank == dies
            assert "is gone" in str(survivor)
        assert stateful.loaded == (errors[1] is None)


@BOTH_WAYS
def test_the_error_names_what_was_on_its_way(world: World) -> None:
    hub, [sender, receiver] = world()

    def die(source: int, target: int, buffer: Tensor) -> None:
        if hub.moved >= 16:
            hub.lose(0)

    hub.tamper = die
    send = sender.send_checkpoint([1], {"w": torch.zeros(200_000)})
    error = receiver.recv_checkpoint(0).exception(LONG)
    assert isinstance(send.exception(LONG), PeerFailed)
    assert isinstance(error, PeerFailed)
    assert error.tensors == ("w",)
    assert "receiving w: rank 0 is gone" in str(error)


class Unhurried:
    """A link on which nobody's patience ends before ``stalled``: until then whoever is late is only slow."""

    def __init__(self, link: Link, stalled: threading.Event) -> None:
        self._link = link
        self._stalled = stalled
        self.rank, self.world_size, self.device = link.rank, link.world_size, link.device
        self.may_share = link.may_share

    def send(self, peer: int, tag: int, data: Tensor) -> Pending:
        return _Unhurried(self._link.send(peer, tag, data), self._stalled)

    def receive(self, peer: int, tag: int, into: Tensor) -> Pending:
        return _Unhurried(self._link.receive(peer, tag, into), self._stalled)


class _Unhurried:
    def __init__(self, pending: Pending, stalled: threading.Event) -> None:
        self._pending = pending
        self._stalled = stalled

    def wait(self, timeout: float) -> None:
        while True:
            over = self._stalled.is_set()
            try:
                return self._pending.wait(timeout)
            except LinkError as error:
                if over or not error.late:
                    raise


class Stuck(Unhurried):
    """One that from its ``after``-th send on does nothing."""

    def __init__(self, link: Link, stalled: threading.Event, after: int) -> None:
        super().__init__(link, stalled)
        self._left = after

    def send(self, peer: int, tag: int, data: Tensor) -> Pending:
        self._left -= 1
        if self._left < 0:
            self._stalled.set()
            return MemoryHub(2).link(0).send(1, 0, data)  # into the void
        return super().send(peer, tag, data)


@BOTH_WAYS
@pytest.mark.parametrize("after", [0, 2, 10])
def test_a_sender_that_stalls_fails_both_within_the_timeout(world: World, way: str, after: int) -> None:
    after = after if way == "group" else min(after, 6)
    stalled = threading.Event()

    def stuck(link: Link) -> Link:
        return Unhurried(link, stalled) if link.rank else Stuck(link, stalled, after)

    _, [sender, receiver] = world(timeout=1.0, link=stuck)
    begun = time.monotonic()
    send = sender.send_checkpoint([1], STATE)
    into = {"w": torch.zeros(25_000), "many": [torch.zeros(50) for _ in range(100)], "n": 0}
    errors = [receiver.recv_checkpoint(0, into).exception(LONG), send.exception(LONG)]
    assert time.monotonic() - begun < LONG / 2
    for error, rank in zip(errors, (0, 1), strict=True):
        assert isinstance(error, PeerFailed)
        assert error.rank == rank
        assert "did nothing for 1 s (timeout=)" in str(error)
    assert into["n"] == 0
    if after >= 6:
        assert errors[0] is not None
        assert errors[0].tensors  # type: ignore[attr-defined]  # a PeerFailed


class Halting(Unhurried):
    """One that at its ``after``-th send does nothing until ``goes_on``, as a process that is stopped."""

    def __init__(self, link: Link, stalled: threading.Event, after: int, goes_on: threading.Event) -> None:
        super().__init__(link, stalled)
        self._left = after
        self._goes_on = goes_on

    def send(self, peer: int, tag: int, data: Tensor) -> Pending:
        self._left -= 1
        if not self._left:
            self._stalled.set()
            assert self._goes_on.wait(LONG)
        return super().send(peer, tag, data)


def test_a_stall_that_not_everybody_waits_for(world: World) -> None:
    """Who waits two seconds gives up after that, by name; who waits longer has it all."""
    goes_on = threading.Event()

    def halting(stalled: threading.Event) -> Callable[[Link], Link]:
        return lambda link: Unhurried(link, stalled) if link.rank else Halting(link, stalled, 15, goes_on)

    _, [patient, waiting] = world(timeout=LONG, link=halting(threading.Event()))
    _, [sender, hasty] = world(timeout=2.0, link=halting(threading.Event()))
    into = {"w": torch.zeros(100_000)}
    sends = [each.send_checkpoint([1], {"w": torch.ones(100_000)}) for each in (patient, sender)]
    begun = time.monotonic()
    whole, failed = waiting.recv_checkpoint(0), hasty.recv_checkpoint(0, into)
    error = failed.exception(LONG)
    assert 1.9 < time.monotonic() - begun < LONG / 2
    assert isinstance(error, PeerFailed)
    assert (error.rank, error.tensors) == (0, ("w",))
    assert "rank 0 did nothing for 2 s (timeout=)" in str(error)
    assert not whole.done()
    goes_on.set()
    assert torch.equal(whole.result(LONG)["w"], torch.ones(100_000))
    sends[0].result(LONG)
    assert isinstance(sends[1].exception(LONG), PeerFailed)


def test_nobody_comes(world: World) -> None:
    _, [sender, _] = world(timeout=0.1)
    error = sender.send_checkpoint([1], STATE).exception(LONG)
    assert isinstance(error, PeerFailed)
    assert "sending the offer of the state: rank 1 did nothing" in str(error)


@BOTH_WAYS
def test_the_others_get_it_all_when_one_receiver_dies(world: World) -> None:
    hub, transports = world(3)
    send = transports[0].send_checkpoint([1, 2], STATE)
    hub.lose(1)
    found = transports[2].recv_checkpoint(0).result(LONG)
    assert torch.equal(found["w"], STATE["w"])  # type: ignore[arg-type]  # of the dict's values
    error = send.exception(LONG)
    assert isinstance(error, PeerFailed)
    assert error.rank == 1


def test_damage_on_the_way_is_found_and_told_on_both_sides(world: World) -> None:
    hub, [sender, receiver] = world()

    def damage(source: int, target: int, buffer: Tensor) -> None:
        if source == 0 and len(buffer) == TINY.block_bytes and int(buffer[0]) != 0xFF:
            buffer[100] ^= 1

    hub.tamper = damage
    stateful = Loads()
    send = sender.send_checkpoint([1], {"w": torch.ones(20_000), "s": Loads()})
    error = receiver.recv_checkpoint(0, {"w": torch.zeros(20_000), "s": stateful}).exception(LONG)
    assert isinstance(error, ChecksumMismatch)
    assert error.tensors == ("w",)
    assert "may be partly written" in str(error)
    assert not stateful.loaded
    assert "does not match its checksum" in str(send.exception(LONG))
    hub.tamper = None
    send = sender.send_checkpoint([1], STATE)
    assert receiver.recv_checkpoint(0).result(LONG)["n"] == 1, "the link can be used again"
    send.result(LONG)


def test_failures_that_nobody_looked_at_come_up_at_close() -> None:
    """Each is named: of a trainer that sends and goes on, every receiver that is lost."""
    transport = PGTransport(MemoryHub(4).link(0), timeout=0.05)
    sends = [transport.send_checkpoint([rank], STATE) for rank in (1, 2, 3)]
    assert isinstance(sends[2].exception(LONG), PeerFailed), "one is looked at"
    with pytest.raises(UnseenFailure, match=r"send to rank 2 failed and nobody looked at it.*did nothing") as raised:
        transport.close()
    [note] = raised.value.__notes__
    assert "send to rank 1 failed and nobody looked at it" in note
    transport.close()


def test_one_that_cannot_begin_holds_nobody_up_at_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process out of descriptors, of which a loop takes some."""

    def full() -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    transport = PGTransport(MemoryHub(2).link(0), timeout=LONG)
    with monkeypatch.context() as out_of_descriptors:
        out_of_descriptors.setattr(asyncio, "SelectorEventLoop", full)
        for verb in (partial(transport.send_checkpoint, [1], STATE), partial(transport.recv_checkpoint, 1)):
            with pytest.raises(OSError, match="Too many open files"):
                verb()
    transport.close()


def test_a_failure_that_was_looked_at_by_staged_does_not_come_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stager, "reserve", lambda _: 1 / 0)
    with PGTransport(MemoryHub(2).link(0), timeout=0.5) as transport:
        send = transport.send_checkpoint([1], STATE)
        assert "ZeroDivisionError" in str(send.staged.exception(LONG))


def test_a_target_that_cannot_be_filled_fails_both(world: World) -> None:
    class Refuses(Loads):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            raise ValueError("not this")

    _, [sender, receiver] = world()
    send = sender.send_checkpoint([1], {"s": Loads()})
    error = receiver.recv_checkpoint(0, {"s": Refuses()}).exception(LONG)
    assert "ValueError: not this" in str(error)
    send.result(LONG)  # all had arrived and was verified; what the receiver makes of it is its own


def test_a_block_that_cannot_be_delivered_leaves_none_on_its_way(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, [sender, receiver] = world()
    on_the_way: list[Pending] = []
    begin, wait = Endpoint.receive, Endpoint.wait

    def receive(self: Endpoint, *args: Any) -> Pending:
        begun = begin(self, *args)
        on_the_way.append(begun)  # both sides' threads do so
        return begun

    def wait_for(self: Endpoint, pending: Pending, *args: Any) -> None:
        wait(self, pending, *args)
        if pending in on_the_way:
            on_the_way.remove(pending)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Endpoint, "receive", receive)
    monkeypatch.setattr(Endpoint, "wait", wait_for)
    monkeypatch.setattr(Landing, "deliver", fail)
    send = sender.send_checkpoint([1], STATE)
    assert "out of memory" in str(receiver.recv_checkpoint(0, empty_like(STATE)).exception(LONG))
    assert "out of memory" in str(send.exception(LONG))
    assert on_the_way == []
