"""The protocol, without processes: frames, tables, errors as data."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Iterator
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdcp import errors
from asyncdcp.errors import AsyncDCPError, ChecksumMismatch, CommitUnknown, StateMismatch, StorageError, WorkerCrashed
from asyncdcp.pipeline.messages import FileJob, SaveJob, SlabReady
from asyncdcp.storage.spec import Fault, FaultySpec, LocalSpec
from asyncdcp.worker import protocol
from asyncdcp.worker.connection import Connection
from asyncdcp.worker.failures import from_frame, to_frame
from asyncdcp.worker.protocol import (
    SAVE_TRANSITIONS,
    WORKER_TRANSITIONS,
    Begin,
    Framer,
    Inspect,
    Leave,
    Machine,
    ProtocolError,
    SaveEvent,
    SaveState,
    ShareArena,
    Slab,
    Staged,
    ToWorker,
    WorkerEvent,
    WorkerState,
    encode,
    save_machine,
    worker_machine,
)

JOB = SaveJob(
    save_id="0" * 20, rank=0, world_size=1, files=[FileJob("a.safetensors", 5)], slab_bytes=8, block_bytes=4,
    plan=msgspec.Raw(b'{"tensors":[1,2]}'), values=msgspec.Raw(b'{"x":null}'), tensors=1, tensor_bytes=5,
    overwrite=False, deadline=1.5, metadata={"a": [1, None, "ä"]}, versions={},
)  # fmt: skip

# ── the tables ──


@pytest.mark.parametrize("start", SaveState)
@pytest.mark.parametrize("event", SaveEvent)
def test_every_event_of_a_save(start: SaveState, event: SaveEvent) -> None:
    walk(Machine(SAVE_TRANSITIONS, start), event, SAVE_TRANSITIONS.get((start, event)))


@pytest.mark.parametrize("start", WorkerState)
@pytest.mark.parametrize("event", WorkerEvent)
def test_every_event_of_a_worker(start: WorkerState, event: WorkerEvent) -> None:
    walk(Machine(WORKER_TRANSITIONS, start), event, WORKER_TRANSITIONS.get((start, event)))


def walk(machine: Machine[Any, Any], event: Any, after: Any) -> None:
    before = machine.state
    if after is not None:
        assert machine.on(event) is machine.state is after
        return
    with pytest.raises(ProtocolError, match=f"{event.name} cannot happen to a (save|worker) that is {before.name}"):
        machine.on(event)
    assert machine.state is before


def test_every_state_is_reached_and_the_dead_stay_dead() -> None:
    for table, start in ((SAVE_TRANSITIONS, SaveState.NEW), (WORKER_TRANSITIONS, WorkerState.STARTING)):
        assert {state for state, _ in table} | set(table.values()) <= set(type(start))
        reached: set[Any] = {start}
        for _ in table:
            reached |= {after for (before, _), after in table.items() if before in reached}
        assert reached == set(type(start))
    assert not [key for key in WORKER_TRANSITIONS if key[0] is WorkerState.DEAD]
    assert not [key for key in SAVE_TRANSITIONS if key[0] is SaveState.FENCED]
    assert save_machine().state is SaveState.NEW
    assert worker_machine().state is WorkerState.STARTING


# ── frames ──

MESSAGES: list[Any] = [
    Begin(3, LocalSpec(b"/a/\xff"), JOB),
    Begin(0, FaultySpec(b"/", [Fault("fsync", 1, "errno", errno.EIO)]), JOB),
    Slab("0" * 20, SlabReady(0, 1, 2, 3)),
    Staged("0" * 20),
    Inspect(),
    Leave(),
]


@given(cuts=st.lists(st.integers(0, 3000), max_size=40))
def test_messages_survive_however_they_are_cut(cuts: list[int]) -> None:
    stream = b"".join(map(encode, MESSAGES))
    framer: Framer[Any] = Framer(ToWorker)
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    heard = [
        message
        for begin, end in itertools.pairwise(places)
        for message in framer.feed(stream[begin:end])
    ]  # fmt: skip
    assert [encode(message) for message in heard] == [encode(message) for message in MESSAGES]
    assert bytes(heard[0].job.plan) == bytes(JOB.plan)
    assert heard[0].storage.path == b"/a/\xff"


@pytest.mark.parametrize(
    "bad", [b"\xff" * 8, *(bytes([len(b), *bytes(7)]) + b for b in (b"{}", b"no", b'{"type":"Begin"}'))]
)
def test_what_is_no_message_is_refused(bad: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(Framer[Any](ToWorker).feed(bad))


# ── connections ──


class Ends:
    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.ended: list[Exception | None] = []
        self.event = anyio.Event()
        left, right = socket.socketpair()
        self.out: Connection[Any] = Connection(left, ToWorker, lambda _: None, lambda _: None)
        self.into: Connection[Any] = Connection(right, ToWorker, self.on_message, self.on_end)

    def on_message(self, message: Any) -> None:
        self.heard.append((message, self.into.take_fd()) if isinstance(message, ShareArena) else message)
        self.tell()

    def on_end(self, error: Exception | None) -> None:
        self.ended.append(error)
        self.tell()

    def tell(self) -> None:
        event, self.event = self.event, anyio.Event()
        event.set()

    def close(self) -> None:
        self.out.close()
        self.into.close()


@pytest.fixture
async def ends() -> Any:
    made = Ends()
    yield made
    made.close()


async def test_a_connection_carries_more_than_the_kernel_holds(ends: Ends) -> None:
    files = [os.memfd_create(str(number)) for number in range(3)]
    big = Begin(1, LocalSpec(b"/" + b"x" * (1 << 20)), JOB)
    for number, fd in enumerate(files):
        ends.out.post(big)
        ends.out.post(ShareArena(number, 1, 4096), fd)
    assert len(ends.heard) == 0  # post never waits
    await ends.out.flushed()
    while len(ends.heard) < 6:
        await ends.event.wait()
    for number, fd in enumerate(files):
        assert len(ends.heard[2 * number].storage.path) == (1 << 20) + 1
        message, given = ends.heard[2 * number + 1]
        assert message.arena == number
        assert not os.get_inheritable(given)
        assert os.fstat(given).st_ino == os.fstat(fd).st_ino
        os.close(given)
        os.close(fd)


async def test_the_other_sides_end_is_heard_once_after_its_last_words(ends: Ends) -> None:
    ends.out.post(Leave())
    ends.out.close()
    while not ends.ended:
        await ends.event.wait()
    assert (ends.heard, ends.ended) == ([Leave()], [None])
    ends.into.post(Leave())  # to nobody
    await ends.into.flushed()


async def test_a_handler_that_fails_ends_the_talk(ends: Ends) -> None:
    ends.out.post(ShareArena(0, 1, 4096))
    while not ends.ended:
        await ends.event.wait()
    assert isinstance(ends.ended[0], ProtocolError)


# ── errors ──


def every_error() -> Iterator[AsyncDCPError]:
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, AsyncDCPError):
            if kind is ChecksumMismatch:
                yield ChecksumMismatch("m", path="/p", block=3, tensors=["a"])
            elif kind is StateMismatch:
                yield StateMismatch("m", missing=["a"], mismatched=["b"])
            elif kind is WorkerCrashed:
                yield WorkerCrashed("m", signal=9, save="0" * 20)
            elif issubclass(kind, StorageError):
                yield kind(f"{name} ä \udcff", path="/p\udcff", errno=errno.ENOSPC)
            else:
                yield kind(name, path="/p")


@pytest.mark.parametrize("error", list(every_error()), ids=lambda error: type(error).__name__)
def test_every_error_comes_out_as_it_went_in(error: AsyncDCPError) -> None:
    error.__cause__ = CommitUnknown("inner", errno=errno.EIO)
    error.__cause__.__cause__ = OSError(errno.EIO, "broken", "/dev/x")
    wire = msgspec.json.encode(to_frame(error))
    back = from_frame(msgspec.json.decode(wire, type=protocol.ErrorFrame))
    assert type(back) is type(error)
    assert str(back) == str(error).encode("utf-8", "backslashreplace").decode()
    assert back.tensors == error.tensors
    assert getattr(back, "errno", None) == getattr(error, "errno", None)
    assert vars(back).keys() - {"__notes__"} == vars(error).keys()
    assert isinstance(back.__cause__, CommitUnknown)
    assert repr(back.__cause__.__cause__) == repr(error.__cause__.__cause__)
    assert "In the background process" in back.__notes__[0]


def test_foreign_errors_are_described() -> None:
    class Own(StorageError):
        pass

    assert type(from_frame(to_frame(Own("x", errno=5)))) is StorageError
    described = from_frame(to_frame(ZeroDivisionError("a/b")))
    assert type(described) is AsyncDCPError
    assert "ZeroDivisionError: a/b" in str(described)
    unknown = from_frame(protocol.ErrorFrame("FromTheFuture", "m", {}))
    assert type(unknown) is AsyncDCPError
    assert str(unknown) == "FromTheFuture: m"
