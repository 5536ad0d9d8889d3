"""Ranks that save to a simulated disk, in processes that may be killed, and what must be found there after a loss of
power, whenever it happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from asyncdcp.boxes import Box, whole
from asyncdcp.errors import AmbiguousCheckpoint, AsyncDCPError, CheckpointNotFound, CommitUnknown, CorruptCheckpoint
from asyncdcp.names import make_save_id
from asyncdcp.pipeline.records import choose_commit, read_records
from asyncdcp.planning import ChunkSpec, Structure, TensorSpec
from asyncdcp.runs.collection import delete_checkpoint
from asyncdcp.storage import LocalStorage, MemoryStorage, Storage
from asyncdcp.storage.local_place import LocalPlace
from asyncdcp.testing.disk import Image, SimulatedDisk
from asyncdcp.testing.power import remains
from tests.pipeline.forge import read_all, writer_of

PLACE: Final = "/runs/gpt/step_1"
LENGTH: Final = 5000
NOTHING: Final = 0
"""The version where there is no checkpoint: a load finds none, or refuses what is there."""

Arrays = dict[str, NDArray[Any]]


def state(version: int) -> Arrays:
    """Two slabs' worth, every byte of which depends on the version."""
    return {"w": np.arange(LENGTH, dtype=np.int32) * 17 + version, "v": np.array([version], dtype=np.int64)}


def structure(rank: int, world: int) -> Structure:
    """Rank 0 holds ``v``; all hold a part of ``w``."""
    tensors = (TensorSpec("w", "int32", (LENGTH,)), TensorSpec("v", "int64", (1,)))
    begin, end = LENGTH * rank // world, LENGTH * (rank + 1) // world
    chunks = [ChunkSpec(0, Box((begin,), (end - begin,)))]
    if rank == 0:
        chunks.append(ChunkSpec(1, whole((1,))))
    return Structure(tensors, tuple(chunks), {}, {"t": "w"}, rank)


ENDLESS: Final = 1 << 60


class Killed(OSError):
    """What calls of a dead process come to: nothing."""


class Call(NamedTuple):
    """A call that is about to be made; called without arguments it is."""

    operation: str
    path: str
    real: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> Any:
        return self.real(*self.args, **self.options)


class Process:
    """A ``Posix`` of one process: its calls go to the disk until it is killed, after ``budget`` that change it.

    ``intercept(call)`` stands between, if given; it makes the call, or does not.
    """

    def __init__(self, disk: SimulatedDisk, budget: int = ENDLESS, intercept: Interceptor | None = None) -> None:
        self._disk = disk
        self._intercept = intercept
        self._paths: dict[int, str] = {}
        self.left = budget

    @property
    def alive(self) -> bool:
        """Whether it was not killed."""
        return self.left > 0

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        real = getattr(self._disk, operation)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.left <= 0:
                raise Killed(5, "killed")
            self.left -= operation in CHANGES
            path = self._paths.get(args[0], "") if isinstance(args[0], int) else args[-1]
            if self._intercept is None:
                result = real(*args, **kwargs)
            else:
                path = args[0] if operation == "open" else path
                result = self._intercept(Call(operation, path, real, args, kwargs))
            if operation == "open":
                self._paths[result] = args[0]
            return result

        return call


Interceptor = Callable[[Call], Any]
CHANGES: Final = frozenset(
    {"open", "pwrite", "fallocate", "ftruncate", "fsync", "link", "rename_noreplace", "unlink", "mkdir", "rmdir"}
)


class ProcessStorage(LocalStorage):
    """The place as one process has it."""

    def __init__(self, process: Process) -> None:
        posix: Any = process  # its calls are found by name
        super().__init__(PLACE, posix=posix)
        self.process = process


class Loss(NamedTuple):
    """Power was lost after a call: what was left, and the versions of which one had to be found."""

    call: str
    expected: frozenset[int]
    image: dict[str, bytes | None]


class World:
    """A disk and the runs on it. ``losses`` are all different states that a loss of power could have left, at most
    about ``limit`` looked at for each call; none are looked for with 0. What is in ``seen`` is not looked at again.
    """

    def __init__(
        self, *, ranks: int = 1, limit: int = 0, seen: Seen | None = None, intercept: Interceptor | None = None
    ) -> None:
        self.disk = SimulatedDisk(after=self.lose_power)
        self.ranks = ranks
        self.lag = 0.0
        """How many (virtual) seconds a rank begins a save after the one before it."""
        self.calls = 0
        self.expected = frozenset({NOTHING})
        self.losses: list[Loss] = []
        self.limit = limit
        self.intercept = intercept
        self._seen = seen if seen is not None else Seen()
        self._interned: dict[bytes, bytes] = {}
        self._attempts = 0

    def lose_power(self, operation: str, path: str) -> None:
        """Looks at what a loss of power would leave now, after an operation."""
        self.calls += 1
        if not self.limit or path.rpartition("/")[2].startswith("."):  # nobody sees a temporary
            return
        for image in remains(self.disk, self.limit, seed=self.calls):
            key = fingerprint(image), self.expected
            if key not in self._seen.states:
                self._seen.states.add(key)
                kept = {path: None if data is None else self._intern(data) for path, data in visible(image)}
                self.losses.append(Loss(f"{operation} {path} (call {self.calls})", self.expected, kept))

    def _intern(self, data: bytes) -> bytes:
        return self._interned.setdefault(data, data)

    def storage(self, budget: int = ENDLESS) -> ProcessStorage:
        """As a new process opens it."""
        return ProcessStorage(Process(self.disk, budget, self.intercept))

    async def save(self) -> None:
        """Saves the next version by all ranks, over what is there. Raises what one of them raised."""
        for error in await self.try_to_save([ENDLESS] * self.ranks):
            if error is not None:
                raise error

    async def try_to_save(self, budgets: Sequence[int]) -> list[BaseException | None]:
        """As ``save``, but each rank's process is killed after ``budgets`` calls; returns what each raised."""
        self._attempts += 1
        self.expected |= {self._attempts}
        jobs = [self._rank_saves(rank, self._attempts, budget) for rank, budget in enumerate(budgets)]
        return await asyncio.gather(*jobs, return_exceptions=True)

    async def _rank_saves(self, rank: int, version: int, budget: int) -> None:
        await asyncio.sleep(rank * self.lag)
        save_id = make_save_id("run", "here", version)
        storage = self.storage(budget)
        writer, _ = writer_of(
            storage,
            state(version),
            structure=structure(rank, self.ranks),
            save_id=save_id,
            rank=rank,
            world_size=self.ranks,
            overwrite=True,
        )
        try:
            await writer.run()
        except AsyncDCPError as error:
            if storage.process.alive and not isinstance(error, CommitUnknown):
                self.expected -= {version}  # said to be given up: it must never be there
            raise
        self.expected = frozenset({version})  # acknowledged, by one rank at least

    async def delete(self) -> None:
        """Removes the checkpoint, if there is one, as retention does."""
        storage, (parent, _, name) = self.storage(), PLACE.rpartition("/")
        posix: Any = storage.process
        place = LocalPlace(parent, posix=posix)
        try:
            record = choose_commit(await read_records(storage, await storage.list()), PLACE)
        except CheckpointNotFound:
            return
        self.expected |= {NOTHING}
        await delete_checkpoint(place, name, record.save_id)
        self.expected = frozenset({NOTHING})

    async def resume(self) -> None:
        """A new process loads: it must find one of the versions that may be there."""
        found = await version_at(self.storage())
        assert found in self.expected, f"resumed with {found}, which is not of {set(self.expected)}"


def visible(image: Image) -> Iterator[tuple[str, bytes | None]]:
    """Without temporaries, which nobody reads."""
    return ((path, data) for path, data in image.items() if not path.rpartition("/")[2].startswith("."))


def fingerprint(image: Image) -> bytes:
    """Equal for equal content of what is visible."""
    hasher = xxhash.xxh3_128()
    for path, data in sorted(visible(image)):
        hasher.update(f"{path}\0{-1 if data is None else len(data)}\0".encode())
        hasher.update(data or b"")
    return hasher.digest()


async def version_at(storage: Storage, *, ambiguous: bool = False) -> int:
    """The version of the checkpoint there, every byte of it compared; ``NOTHING`` where there is none. With
    ``ambiguous``, two of them raise ``AmbiguousCheckpoint``.
    """
    try:
        found = await read_all(storage)
    except (CheckpointNotFound, CorruptCheckpoint) as error:
        if ambiguous and isinstance(error, AmbiguousCheckpoint):
            raise
        return NOTHING
    version = int(found["v"][0])
    expected = state(version)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected), "a mix of two states was loaded"
    return version


class Seen:
    """What was looked at already: states, each with what had to be found there; and the version that files make up."""

    def __init__(self) -> None:
        self.states: set[tuple[bytes, frozenset[int]]] = set()
        self._versions: dict[bytes, int] = {}

    async def version(self, image: Image) -> int:
        """As ``version_at``; the same files are loaded once."""
        prefix = f"{PLACE}/"
        files = {path: data for path, data in visible(image) if path.startswith(prefix) and data is not None}
        key = fingerprint(files)
        if key not in self._versions:
            storage = MemoryStorage("after the loss")
            storage._objects.update((path.removeprefix(prefix), data) for path, data in files.items())
            self._versions[key] = await version_at(storage)
        return self._versions[key]


async def check(loss: Loss, seen: Seen | None = None) -> None:
    """Power comes back: what is found must be whole, and one of what was acknowledged."""
    found = await (seen or Seen()).version(loss.image)
    if found not in loss.expected:
        raise Lost(f"power lost after {loss.call}: found version {found}, not one of {sorted(loss.expected)}")


async def check_that_work_goes_on(loss: Loss, seen: Seen) -> None:
    """A run that starts on what was left saves over it, and finds its own save, also after another loss of power."""
    world = World()
    world.disk = SimulatedDisk(loss.image)
    world._attempts = 90
    await world.save()
    for image in remains(world.disk, 8):
        if await seen.version(image) != 91:
            raise Lost(f"power lost after {loss.call}, then a save, then again: the save is gone")


class Lost(AssertionError):
    """A promise is broken."""
