"""Blocks by shared memory: who may take them so, what is left of it, damage, and memory that runs out."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from asyncdcp import CheckpointFuture
from asyncdcp.arena import Arena
from asyncdcp.errors import ChecksumMismatch, MemoryLimit, PeerError, PeerFailed
from asyncdcp.transport import MemoryHub, ReceiveReport, TransportOptions, wire
from asyncdcp.transport import receiver as receiver_module
from asyncdcp.transport.shared import SharedBlocks
from asyncdcp.transport.wire import BATCH_BLOCKS, Accept, SharedMemory
from tests.transport.conftest import LONG, TINY, World, brought, empty_like

Same = Callable[[Any, Any], bool]
STATE = {"w": torch.arange(60_000.0), "turned": torch.arange(9_000.0).view(90, 100).t(), "n": 1}
"""Nine batches: every slot is used again and again."""


@pytest.fixture
def way() -> str:
    return "shared"


def memfds() -> set[str]:
    """The memories that this process has descriptors of, or has mapped, but for what only the garbage collector has."""
    gc.collect()
    fds = []
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the folder's own, closed since
            fds.append(os.readlink(fd))
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return {each for each in [*fds, *mapped] if "memfd:asyncdcp-" in each}


def test_nothing_is_left_of_it(world: World, same: Same) -> None:
    """Not after a transfer, nor after one that failed on either side."""
    before = memfds()
    _, transports = world()
    assert same(brought(transports, STATE, empty_like(STATE)), STATE)
    transports[0].close()
    assert memfds() <= before
    for rank in (0, 1):
        hub, [sender, receiver] = world()

        def die(source: int, target: int, buffer: torch.Tensor, hub: MemoryHub = hub, rank: int = rank) -> None:
            if hub.moved >= 10:
                hub.lose(rank)

        hub.tamper = die
        send, received = sender.send_checkpoint([1], STATE), receiver.recv_checkpoint(0)
        assert isinstance(send.exception(LONG), PeerFailed)
        assert isinstance(received.exception(LONG), PeerFailed)
        del send, received
        sender.close()
        receiver.close()
    assert memfds() <= before


def shared(received: CheckpointFuture[Any]) -> bool:
    assert isinstance(received.report, ReceiveReport)
    return received.report.shared


def made(slot_bytes: int = 8192) -> tuple[SharedBlocks, SharedMemory]:
    blocks = SharedBlocks.make(slot_bytes)
    assert blocks is not None
    offer = blocks.offer()
    assert offer is not None
    return blocks, offer


def test_what_one_side_puts_there_the_other_finds() -> None:
    blocks, offer = made()
    opened = SharedBlocks.open(offer, 5000)
    assert opened is not None
    slots = wire.AHEAD * BATCH_BLOCKS
    for number in (0, 3, slots - 1, slots, slots + 3):
        blocks.take(number, 5000).fill_(number)
        assert bool((opened.block(number, 5000) == number).all())
    assert bool((opened.block(3, 5000) == slots + 3).all()), "it has the slot of block 3"
    kept = opened.block(0, 10)
    blocks.close()
    opened.close()
    opened.close()
    assert kept.tolist() == [slots] * 10


def test_nobody_takes_other_memory_for_it(tmp_path: Path) -> None:
    """A process that is not there, another key, another size, a pipe, a file, another memory of the same name."""
    blocks, offer = made()
    read, write = os.pipe()
    file = (tmp_path / "file").open("wb")
    file.truncate(1 << 20)
    other, _ = made()
    unsealed = os.memfd_create("asyncdcp-arena", os.MFD_CLOEXEC)
    os.truncate(unsealed, 1 << 20)
    os.pwrite(unsealed, offer.key, 16 * 8192)
    fds = (read, write, file.fileno(), other._arena.fd, unsealed, 10_000, -1)
    wrong = [structs.replace(offer, fd=fd) for fd in fds]
    wrong += [structs.replace(offer, pid=2**22 + 1), structs.replace(offer, key=b"x" * 32)]
    wrong += [
        structs.replace(offer, key=b""),
        *(structs.replace(offer, slot_bytes=n) for n in (0, 4096, 8191, 1 << 60)),
    ]
    for each in wrong:
        assert SharedBlocks.open(each, 5000) is None, each
    assert SharedBlocks.open(offer, 50_000) is None, "it is smaller than that"
    for fd in (read, write, unsealed):
        os.close(fd)
    file.close()
    other.close()
    blocks.close()
    assert SharedBlocks.open(offer, 5000) is None


def test_the_memory_is_kept_between_sends_and_has_another_key_for_each(world: World, same: Same) -> None:
    before, [sender, receiver] = memfds(), world()[1]
    keys = []
    for _ in range(2):
        assert same(brought([sender, receiver], STATE, empty_like(STATE)), STATE)
        assert sender._pool._kept is not None
        keys.append(sender._pool._kept._key)
    assert keys[0] != keys[1]
    first, second = sender._pool.take(), sender._pool.take()
    assert first is not None
    assert second is not None
    sender._pool.give(first)
    sender._pool.give(second)
    assert sender._pool._kept is first
    taken = sender._pool.take()
    sender.close()
    assert taken is first
    sender._pool.give(taken)
    assert memfds() <= before


def test_what_fits_the_buffers_goes_by_the_group(world: World) -> None:
    _, [sender, receiver] = world()
    send = sender.send_checkpoint([1], {"w": torch.ones(TINY.buffer_bytes // 4)})
    received = receiver.recv_checkpoint(0)
    received.result(LONG)
    send.result(LONG)
    assert not shared(received)


def test_a_receiver_that_wants_what_was_not_offered_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, [sender, receiver] = world()
    monkeypatch.setattr(receiver_module, "Accept", lambda rank, _: Accept(rank, True))
    send = sender.send_checkpoint([1], {"w": torch.ones(3)})
    received = receiver.recv_checkpoint(0)
    error = send.exception(LONG)
    assert isinstance(error, PeerError)
    assert "rank 1 takes blocks from shared memory, and none was offered" in str(error)
    sender.close()
    receiver._link._hub.lose(0)  # type: ignore[attr-defined]  # it would wait for long
    assert isinstance(received.exception(LONG), PeerFailed)


def test_who_cannot_open_it_gets_the_blocks_by_the_group(
    world: World, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside others that can, from one staging."""
    refused = threading.Lock()

    def open_(*args: Any) -> SharedBlocks | None:
        return None if refused.acquire(blocking=False) else real(*args)

    real = SharedBlocks.open
    monkeypatch.setattr(SharedBlocks, "open", open_)
    _, transports = world(3)
    send = transports[0].send_checkpoint([1, 2], STATE)
    futures = [transports[rank].recv_checkpoint(0, empty_like(STATE)) for rank in (1, 2)]
    for future in futures:
        assert same(future.result(LONG), STATE)
    send.result(LONG)
    assert sorted(map(shared, futures)) == [False, True]


@pytest.mark.parametrize("options", [replace(TINY, shared_memory=False), replace(TINY, staging="whole")])
def test_a_sender_may_not_want_it(world: World, same: Same, options: TransportOptions) -> None:
    _, [sender, receiver] = world(options=options)
    send = sender.send_checkpoint([1], STATE)
    received = receiver.recv_checkpoint(0, empty_like(STATE))
    assert same(received.result(LONG), STATE)
    assert not shared(received)
    send.result(LONG)


@pytest.mark.parametrize("error", [MemoryLimit("none is left"), OSError("no descriptors")])
def test_where_there_is_no_memory_for_it_the_group_is_used(
    world: World, same: Same, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Arena, "__init__", refuse)
    monkeypatch.setattr(Arena, "__del__", lambda _: None)
    _, transports = world()
    assert same(brought(transports, STATE, empty_like(STATE)), STATE)


def test_where_no_page_is_left_for_its_key_the_group_is_used(
    world: World, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space")

    _, transports = world()
    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(Arena, "prefault_slot", full)
    assert same(brought(transports, STATE, empty_like(STATE)), STATE)


@pytest.mark.parametrize("after", [0, 5, 2 * BATCH_BLOCKS - 1])
def test_memory_that_runs_out_on_the_way_ends_in_order(
    world: World, same: Same, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    prefault = Arena.prefault_slot

    def run_out(arena: Arena, n: int) -> None:
        if n == after:
            raise MemoryLimit("none is left")
        prefault(arena, n)

    _, transports = world()
    monkeypatch.setattr(Arena, "prefault_slot", run_out)
    send = transports[0].send_checkpoint([1], STATE)
    received = transports[1].recv_checkpoint(0).exception(LONG)
    assert isinstance(received, PeerFailed)
    assert "give the transport a smaller buffer_bytes=, or shared_memory=False" in str(received)
    assert isinstance(send.exception(LONG), MemoryLimit)
    monkeypatch.undo()
    assert same(brought(transports, STATE, empty_like(STATE)), STATE)


def test_damage_is_found_and_told_on_both_sides(world: World, same: Same, monkeypatch: pytest.MonkeyPatch) -> None:
    take = SharedBlocks.take

    def damaged(blocks: SharedBlocks, number: int, length: int) -> torch.Tensor:
        if number == 12:  # the one before is hashed by now
            blocks.block(11, 100)[99] ^= 1
        return take(blocks, number, length)

    monkeypatch.setattr(SharedBlocks, "take", damaged)
    _, transports = world()
    send = transports[0].send_checkpoint([1], STATE)
    error = transports[1].recv_checkpoint(0, empty_like(STATE)).exception(LONG)
    assert isinstance(error, ChecksumMismatch)
    assert error.block == 11
    assert "may be partly written" in str(error)
    assert "does not match its checksum" in str(send.exception(LONG))
    monkeypatch.undo()
    assert same(brought(transports, STATE, empty_like(STATE)), STATE)
