"""Storages that are stuck or fail on purpose, and checkpointers whose deadlines a test can wait for."""

from __future__ import annotations

import gc
import subprocess
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from anyio import to_thread

from asyncdcp import AsyncCheckpointer, MemoryStorage, Options
from asyncdcp.names import record_save_id
from tests.programs import Programs

LONG = 150.0  # a deadline that only a failing test reaches: a cold cache makes importing torch take half a minute

STATE = {"w": torch.arange(17 * (1 << 20) // 4, dtype=torch.float32)}  # three slabs
SMALL = {"w": torch.arange(10)}
Opened = Callable[..., AsyncCheckpointer]
"""The fixture ``opened``."""

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Gate:
    """Where an operation of a storage waits: ``begun`` says that it is there, ``release`` lets it go on."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.release = threading.Event()

    def wait_begun(self) -> None:
        assert self.begun.wait(LONG)


class FaultyStorage(MemoryStorage):
    """``errors[operation, n]`` is raised by its n-th call (from 1), ``gates[operation, n]`` holds it up on a thread,
    as a disk would; n = 0 stands for every call. Operations: list, create, write, finish, put, barrier, claim, get.
    """

    def __init__(self, name: str = "faulty") -> None:
        super().__init__(name)
        self.errors: dict[tuple[str, int], Exception] = {}
        self.gates: dict[tuple[str, int], Gate] = {}
        self.calls: Counter[str] = Counter()

    def gate(self, operation: str, number: int = 0) -> Gate:
        return self.gates.setdefault((operation, number), Gate())

    def open_all(self) -> None:
        for gate in self.gates.values():
            gate.release.set()

    async def fault(self, operation: str) -> None:
        self.calls[operation] += 1
        for number in (self.calls[operation], 0):
            if (gate := self.gates.get((operation, number))) is not None:
                gate.begun.set()
                await to_thread.run_sync(gate.release.wait, LONG)
            if (error := self.errors.get((operation, number))) is not None:
                raise error

    async def create(self, name: str, length_hint: int) -> Any:
        await self.fault("create")
        return _FaultyWriter(self, await super().create(name, length_hint))

    async def put(self, name: str, data: bytes) -> None:
        await self.fault("put")
        if not await super().claim(name, data):
            raise FileExistsError(name)

    async def claim(self, name: str, data: bytes) -> bool:
        await self.fault("claim")
        return await super().claim(name, data)

    async def barrier(self) -> None:
        await self.fault("barrier")

    async def get(self, name: str, limit: int) -> bytes:
        await self.fault("get")
        return await super().get(name, limit)

    async def list(self) -> dict[str, int]:
        await self.fault("list")
        return await super().list()

    async def delete(self, names: Sequence[str]) -> None:
        await self.fault("delete")
        await super().delete(names)

    @property
    def names(self) -> dict[str, bytes]:
        return self._objects

    @property
    def unfinished(self) -> set[str]:
        return set(self._unfinished)


class _FaultyWriter:
    def __init__(self, storage: FaultyStorage, inner: Any) -> None:
        self._storage = storage
        self._inner = inner
        self.alignment = 1

    async def write(self, offset: int, buffer: memoryview) -> None:
        await self._storage.fault("write")
        await self._inner.write(offset, buffer)

    async def finish(self, length: int) -> None:
        await self._storage.fault("finish")
        await self._inner.finish(length)

    async def abort(self) -> None:
        await self._inner.abort()


@pytest.fixture
def faulty() -> Iterator[Callable[..., FaultyStorage]]:
    """Makes faulty storages; whatever is stuck in one is let go at the end."""
    made: list[FaultyStorage] = []

    def make(name: str = "faulty") -> FaultyStorage:
        made.append(FaultyStorage(name))
        return made[-1]

    yield make
    for storage in made:
        storage.open_all()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``process`` is where the pipeline runs: either way for what saves to a directory, or looks at mapped memory. What
    saves to memory alone stays on a thread in any case, so it runs once.
    """
    if "process" in metafunc.fixturenames:
        ways = {"thread": False, "process": True}
        if not {"tmp_path", "others"} & set(metafunc.fixturenames):
            del ways["process"]
        metafunc.parametrize("process", ways.values(), ids=ways)


def idle(checkpointer: AsyncCheckpointer) -> bool:
    """Whether no slot is taken and nobody uses the arena."""
    arena = checkpointer._lanes.arenas._current
    assert arena is not None
    found = arena.ring.statistics()
    return (arena.users, found.in_use, found.waiting) == (0, 0, 0)


def works(checkpointer: AsyncCheckpointer) -> bool:
    """Whether another full save, through every slot, does."""
    storage = MemoryStorage("after")
    checkpointer.save(storage, STATE).result()
    return torch.equal(checkpointer.load(storage).result()["w"], STATE["w"]) and idle(checkpointer)


def wait_until(condition: Callable[[], bool]) -> None:
    """For what comes soon, of itself, and says nothing when it does."""
    until = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def save_ids(folder: Path) -> set[str]:
    """The saves whose Record is there."""
    return {save_id for path in folder.iterdir() if (save_id := record_save_id(path.name))}


@pytest.fixture
def checkpointer(process: bool) -> Iterator[AsyncCheckpointer]:
    """An ordinary one. A failure that the test has not looked at fails the test at close."""
    with AsyncCheckpointer(process=process) as made:
        yield made


@pytest.fixture
def opened(process: bool) -> Iterator[Callable[..., AsyncCheckpointer]]:
    """Makes checkpointers by their options, and closes them. What was stuck has been let go by then, and on a busy
    machine it takes its time to end.
    """
    with ExitStack() as stack:

        def make(**options: Any) -> AsyncCheckpointer:
            made = AsyncCheckpointer(Options(**options), process=process)
            stack.callback(close_patiently, made)
            return made

        yield make


def close_patiently(checkpointer: AsyncCheckpointer) -> None:
    """Closes one whose ``settle_seconds`` are few, so that what is stuck is given up soon. Nothing is any more."""
    object.__setattr__(checkpointer._options, "settle_seconds", LONG)
    checkpointer.close()


@pytest.fixture
def bits() -> Callable[[torch.Tensor], torch.Tensor]:
    """A tensor's elements as integers of the same size, contiguous: for a comparison that forgives nothing."""

    def make(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().resolve_conj().resolve_neg()
        if tensor.dtype is torch.complex128:
            tensor = torch.view_as_real(tensor)
        return tensor.view(_SAME_SIZE[tensor.element_size()]).contiguous()

    return make


@pytest.fixture
def uncollected() -> Iterator[None]:
    """The garbage collector comes by only before."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def python(tmp_path: Path, programs: Programs) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program in a process of its own, whose current directory is the test's."""

    def run(code: str, *strict: str) -> subprocess.CompletedProcess[str]:
        return programs.run("-c", textwrap.dedent(code), cwd=tmp_path, strict=strict, timeout=LONG)

    return run
