"""The order of staging from accelerators: a fake one in the place of the host, whose work is done when told."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from asyncdcp import AsyncCheckpointer, MemoryStorage, Options, SaveHandle
from asyncdcp.errors import UsageError
from asyncdcp.planning import plan_save
from asyncdcp.staging import SlabCopier, arenas, devices
from asyncdcp.staging.accelerator import DeviceFence
from asyncdcp.state_dict.flatten import flatten
from asyncdcp.state_dict.structure import describe

LONG = 150.0  # a deadline that only a failing test reaches
SLABS = 4  # more than are copied at once
LENGTH = (SLABS * (8 << 20) - 4096) // 4


class FakeWork:
    """A device whose copies arrive when ``reached`` is set. ``log`` says what it was told, in order."""

    asynchronous = True

    def __init__(self) -> None:
        self.log: list[str] = []
        self.reached = threading.Event()
        self.is_captured = False
        self._numbers = itertools.count()
        self._current = threading.local()

    def capturing(self) -> bool:
        return self.is_captured

    def mark(self) -> str:
        mark = f"mark {next(self._numbers)}"
        self.log.append(f"{self.stream}: {mark}")
        return mark

    def wait(self, mark: str) -> None:
        self.log.append(f"{self.stream}: waits for {mark}")

    def wait_on_host(self, mark: str) -> None:
        self.log.append(f"host: waits for {mark}")
        assert self.reached.wait(LONG)

    def side_stream(self) -> str:
        return f"side {next(self._numbers)}"

    @property
    def stream(self) -> str:
        return getattr(self._current, "stream", "current")

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        self._current.stream = stream
        try:
            yield
        finally:
            del self._current.stream


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWork]:
    """The host's memory is an accelerator's."""
    made, copy = FakeWork(), SlabCopier.copy

    def logged(self: SlabCopier, *args: Any) -> Any:
        arrival = copy(self, *args)
        made.log.append("copied")
        return arrival

    monkeypatch.setattr(SlabCopier, "copy", logged)
    monkeypatch.setattr(devices, "is_on_host", lambda _: False)
    monkeypatch.setattr(devices, "work_on", lambda _: made)
    monkeypatch.setattr(arenas, "register_host_memory", lambda *_: lambda: None)
    yield made
    made.reached.set()


@pytest.fixture
def checkpointer() -> Iterator[AsyncCheckpointer]:
    with AsyncCheckpointer(Options(guard_deadline=LONG), process=False) as made:
        yield made


class Adding(torch.optim.Optimizer):
    """Adds one, seen by no version counter."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is ever given
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(1)


def begin(checkpointer: AsyncCheckpointer) -> tuple[Adding, MemoryStorage, SaveHandle]:
    """A guarded optimizer of a parameter of several slabs, and a save of it."""
    parameter, storage = nn.Parameter(torch.ones(LENGTH)), MemoryStorage()
    optimizer = Adding([parameter])
    checkpointer.guard(optimizer)
    return optimizer, storage, checkpointer.save(storage, {"w": parameter})


def stepping(optimizer: Adding) -> tuple[threading.Thread, threading.Event]:
    """A step on a thread, and what is set when it is done."""
    done = threading.Event()

    def step() -> None:
        optimizer.step()
        done.set()

    thread = threading.Thread(target=step)
    thread.start()
    return thread, done


def test_a_step_waits_by_stream_once_all_copies_are_enqueued(checkpointer: AsyncCheckpointer, work: FakeWork) -> None:
    optimizer, storage, save = begin(checkpointer)
    optimizer.step()  # nothing has arrived, so that one that waited on the host would hang
    assert not save.staged.done()
    side = work.log[1].partition(":")[0]
    assert work.log[:2] == ["current: mark 0", f"{side}: waits for mark 0"]
    *_, last = (entry for entry in work.log if entry.startswith(side))
    waited = next(entry for entry in work.log if entry.startswith("current: waits"))
    assert waited == f"current: waits for {last.removeprefix(side + ': ')}"
    assert [entry for entry in work.log[: work.log.index(last)] if entry == "copied"] == ["copied"] * SLABS
    work.reached.set()
    save.result(LONG)
    assert bool((checkpointer.load(storage).result(LONG)["w"] == 1).all())


def test_until_then_it_waits_on_the_host(
    checkpointer: AsyncCheckpointer, work: FakeWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, copy, numbers = threading.Event(), SlabCopier.copy, itertools.count(1)

    def late(self: SlabCopier, *args: Any) -> Any:
        if next(numbers) == SLABS:
            assert gate.wait(LONG)
        return copy(self, *args)

    monkeypatch.setattr(SlabCopier, "copy", late)
    optimizer, _, save = begin(checkpointer)
    thread, done = stepping(optimizer)
    assert not done.wait(0.05)
    assert not any(entry.startswith("current: waits") for entry in work.log)
    gate.set()
    assert done.wait(LONG)
    thread.join()
    assert not save.staged.done()
    work.reached.set()
    save.result(LONG)


def test_a_captured_step_waits_on_the_host(checkpointer: AsyncCheckpointer, work: FakeWork) -> None:
    optimizer, _, save = begin(checkpointer)
    work.is_captured = True
    thread, done = stepping(optimizer)
    assert not done.wait(0.05)
    work.reached.set()
    assert done.wait(LONG)
    thread.join()
    assert not any(entry.startswith("current: waits") for entry in work.log)
    save.result(LONG)


def test_a_save_within_a_capture_is_refused(checkpointer: AsyncCheckpointer, work: FakeWork) -> None:
    work.is_captured = True
    with pytest.raises(UsageError, match="CUDA graph"):
        checkpointer.save(MemoryStorage(), {"w": torch.ones(3)})
    assert work.log == []


@pytest.mark.parametrize("end", ["failure", "cancel"])
def test_copies_under_way_are_waited_for_whatever_goes_wrong(
    checkpointer: AsyncCheckpointer, work: FakeWork, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    copy, numbers, reached = SlabCopier.copy, itertools.count(1), threading.Event()

    def failing(self: SlabCopier, *args: Any) -> Any:
        if next(numbers) == SLABS:
            reached.set()
            if end == "failure":
                raise ZeroDivisionError
        return copy(self, *args)

    monkeypatch.setattr(SlabCopier, "copy", failing)
    optimizer, _, save = begin(checkpointer)
    assert reached.wait(LONG)
    if end == "cancel":
        save.cancel()
    assert not save.committed.wait(0.05)
    work.reached.set()
    assert save.exception(LONG) is not None
    optimizer.step()
    optimizer.step()


def test_slabs_in_bounce_buffers_have_arrived_before_the_buffer_is_used_again(
    checkpointer: AsyncCheckpointer, work: FakeWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **options: empty(*args, **options))
    monkeypatch.setattr(arenas, "register_host_memory", lambda *_: None)
    work.reached.set()
    _, storage, save = begin(checkpointer)
    save.result(LONG)
    assert sum(entry.startswith("host: waits") for entry in work.log) >= SLABS
    assert bool((checkpointer.load(storage).result(LONG)["w"] == 1).all())


# ── devices without streams, and captures elsewhere ──


def test_a_device_without_streams_is_waited_for_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(synchronize=lambda: waits.append(1)))
    work = devices.work_on(torch.device("mps"))
    assert isinstance(work, devices.BlockingWork)
    assert not work.asynchronous
    assert not work.capturing()
    work.mark()
    assert waits == [1]
    with work.on(None):
        work.wait(None)
        work.wait_on_host(None)


def test_a_device_without_streams_takes_the_whole_path(
    checkpointer: AsyncCheckpointer, work: FakeWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace())
    monkeypatch.setattr(devices, "work_on", devices.BlockingWork)
    optimizer, storage, save = begin(checkpointer)
    optimizer.step()
    save.result(LONG)
    assert bool((checkpointer.load(storage).result(LONG)["w"] == 1).all())
    assert work.log == ["copied"] * SLABS


@pytest.mark.parametrize("code", [0, 3])
def test_calls_are_made_in_the_relaxed_capture_mode(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    mode = [0]

    def exchange(pointer: Any) -> int:
        given = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))
        if code == 0:
            mode[0], given[0] = given[0], mode[0]
        return code

    monkeypatch.setattr(devices, "_exchange", lambda: exchange)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ZeroDivisionError), devices.beside_captures():
        assert mode == [2 if code == 0 else 0]
        with devices.beside_captures():
            pass
        assert mode == [2 if code == 0 else 0]
        raise ZeroDivisionError
    assert mode == [0]


class CopiesOnTheirWay(TorchFunctionMode):
    """How many copies were begun and not waited for, and of how many the source is not what its memory says."""

    begun = lazy = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_ and kwargs["non_blocking"]:
            self.begun += 1
            self.lazy += args[1].is_conj() or args[1].is_neg()
        return func(*args, **(kwargs or {}))


def test_what_is_conjugated_or_negated_when_read_is_so_before_it_is_on_its_way(work: FakeWork) -> None:
    values = torch.randn(20_000, dtype=torch.complex64)
    state = {"conj": values.conj(), "neg": values.conj().imag, "plain": values.real}
    described = describe(flatten(state))
    plan = plan_save(described.structure)
    copier = SlabCopier(plan, described.sources, DeviceFence(described.sources))
    [slab] = plan.slabs
    into = torch.zeros(slab.length, dtype=torch.uint8)
    with CopiesOnTheirWay() as copies:
        assert copier.copy(slab, into) is not None
    assert (copies.begun, copies.lazy) == (3, 0)
    for piece in slab.pieces:
        name = described.structure.tensors[plan.chunks[piece.chunk].tensor].name
        found = into[piece.offset : piece.offset + piece.length].view(state[name].dtype)
        assert torch.equal(found, state[name]), name
