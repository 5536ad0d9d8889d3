"""Ranks that save to a simulated disk, in processes that may be killed, and what must be found there after a loss of
power, whenever it happens.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncdcp.boxes import Box, whole
from asyncdcp.errors import CheckpointNotFound, CorruptCheckpoint
from asyncdcp.names import make_save_id
from asyncdcp.pipeline.records import choose_commit, read_records
from asyncdcp.planning import ChunkSpec, Structure, TensorSpec
from asyncdcp.runs.deletion import delete_checkpoint
from asyncdcp.storage import LocalStorage, MemoryStorage
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


class Killed(OSError):
    """What calls of a dead process come to: nothing."""


class Process:
    """A ``Posix`` of one process: its calls go to the disk until it is killed, after ``budget`` that change it.

    ``intercept(operation, path, call)`` stands between, if given; it makes the call, or does not.
    """

    def __init__(self, disk: SimulatedDisk, budget: int = 1 << 60, intercept: Interceptor | None = None) -> None:
        self._disk = disk
        self._intercept = intercept
        self._paths: dict[int, str] = {}
        self.left = budget

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        real = getattr(self._disk, operation)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.left <= 0:
                raise Killed(5, "killed")
            self.left -= operation in CHANGES
            path = self._paths.get(args[0], "") if isinstance(args[0], int) else args[-1]
            made = lambda: real(*args, **kwargs)  # noqa: E731
            if self._intercept is None:
                result = made()
            else:
                result = self._intercept(operation, args[0] if operation == "open" else path, made)
            if operation == "open":
                self._paths[result] = args[0]
            return result

        return call


Interceptor = Callable[[str, str, Callable[[], Any]], Any]
CHANGES: Final = frozenset(
    {"open", "pwrite", "fallocate", "ftruncate", "fsync", "link", "rename_noreplace", "unlink", "mkdir", "rmdir"}
)


class Loss(NamedTuple):
    """Power was lost after a call: what was left, and the versions of which one had to be found."""

    call: str
    expected: frozenset[int]
    image: dict[str, bytes | None]


class World:
    """A disk and the runs on it. ``losses`` are all different states that a loss of power could have left, at most
    about ``limit`` looked at for each call; none are looked for with 0.
    """

    def __init__(self, *, ranks: int = 1, limit: int = 0, intercept: Interceptor | None = None) -> None:
        self.disk = SimulatedDisk({"/runs": None}, after=self._after)
        self.ranks = ranks
        self.calls = 0
        self.expected = frozenset({NOTHING})
        self.losses: list[Loss] = []
        self.points = 0
        self._limit = limit
        self._intercept = intercept
        self._seen: set[tuple[bytes, frozenset[int]]] = set()
        self._interned: dict[bytes, bytes] = {}
        self._attempts = 0

    def _after(self, operation: str, path: str) -> None:
        self.calls += 1
        if not self._limit:
            return
        self.points += 1
        for image in remains(self.disk, self._limit, seed=self.calls):
            key = fingerprint(image), self.expected
            if key not in self._seen:
                self._seen.add(key)
                kept = {path: None if data is None else self._intern(data) for path, data in visible(image)}
                self.losses.append(Loss(f"{operation} {path} (call {self.calls})", self.expected, kept))

    def _intern(self, data: bytes) -> bytes:
        return self._interned.setdefault(data, data)

    def storage(self, budget: int = 1 << 60) -> LocalStorage:
        """As a new process opens it."""
        posix: Any = Process(self.disk, budget, self._intercept)
        return LocalStorage(PLACE, posix=posix)

    async def save(self, budgets: list[int] | None = None) -> None:
        """Saves the next version by all ranks, over what is there. With ``budgets``, each rank's process is killed
        after so many calls.
        """
        self._attempts += 1
        version = self._attempts
        self.expected |= {version}
        jobs = [self._rank_saves(rank, version, budgets[rank] if budgets else 1 << 60) for rank in range(self.ranks)]
        results = await asyncio.gather(*jobs, return_exceptions=True)
        for error in results:
            if isinstance(error, BaseException) and not budgets:
                raise error

    async def _rank_saves(self, rank: int, version: int, budget: int) -> None:
        save_id = make_save_id("run", "here", version)
        writer, _ = writer_of(
            self.storage(budget),
            state(version),
            structure=structure(rank, self.ranks),
            save_id=save_id,
            rank=rank,
            world_size=self.ranks,
            overwrite=True,
        )
        await writer.run()
        self.expected = frozenset({version})  # acknowledged, by one rank at least

    async def delete(self) -> None:
        """Removes the checkpoint as retention does."""
        posix: Any = Process(self.disk, intercept=self._intercept)
        parent, _, name = PLACE.rpartition("/")
        place, storage = LocalPlace(parent, posix=posix), LocalStorage(PLACE, posix=posix)
        record = choose_commit(await read_records(storage, await storage.list()), PLACE)
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
    hasher = hashlib.blake2b(digest_size=16)
    for path, data in sorted(visible(image)):
        hasher.update(f"{path}\0{-1 if data is None else len(data)}\0".encode())
        hasher.update(data or b"")
    return hasher.digest()


async def version_at(storage: LocalStorage | MemoryStorage) -> int:
    """The version of the checkpoint there, every byte of it compared; ``NOTHING`` where there is none."""
    try:
        found = await read_all(storage)
    except (CheckpointNotFound, CorruptCheckpoint):
        return NOTHING
    version = int(found["v"][0])
    expected = state(version)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected), "a mix of two states was loaded"
    return version


async def check(loss: Loss) -> None:
    """Power comes back: what is found must be whole, and one of what was acknowledged; and a new save must work."""
    storage = MemoryStorage("after the loss")
    prefix = f"{PLACE}/"
    for path, data in loss.image.items():
        if path.startswith(prefix) and data is not None:
            storage._objects[path.removeprefix(prefix)] = data
    found = await version_at(storage)
    if found not in loss.expected:
        raise Lost(f"power lost after {loss.call}: found version {found}, not one of {sorted(loss.expected)}")


async def check_that_work_goes_on(loss: Loss) -> None:
    """A run that starts on what was left saves over it, and finds its own save, also after another loss of power."""
    world = World()
    world.disk = SimulatedDisk(loss.image)
    world._attempts = 90
    await world.save()
    for image in remains(world.disk, 8):
        again = LocalStorage(PLACE, posix=SimulatedDisk(image))
        if await version_at(again) != 91:
            raise Lost(f"power lost after {loss.call}, then a save, then again: the save is gone")


class Lost(AssertionError):
    """A promise is broken."""
