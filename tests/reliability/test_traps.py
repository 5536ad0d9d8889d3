"""Known traps that no other test is about."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncdcp import AsyncCheckpointer, Options
from asyncdcp.errors import StorageFull
from asyncdcp.pipeline.records import read_records
from asyncdcp.storage import MemoryStorage
from tests.pipeline.forge import SAVE, writer_of
from tests.reliability.simulation import simulated
from tests.reliability.worlds import World, state, structure, version_at
from tests.virtual import run

SLAB = 8 << 20


class Lagging(MemoryStorage):
    """A listing shows a name only the third time that it could: as on some network filesystems."""

    def __init__(self, shared: MemoryStorage) -> None:
        super().__init__()
        self._objects = shared._objects
        self._shown: dict[str, int] = {}

    async def list(self) -> dict[str, int]:
        found = await super().list()
        for name in found:
            self._shown[name] = self._shown.get(name, 0) + 1
        return {name: size for name, size in found.items() if self._shown[name] > 2}


def test_a_listing_that_lags() -> None:
    """The committer waits a little longer, or gives up; nobody takes a half for the whole, and all agree."""

    async def main() -> None:
        shared = MemoryStorage()
        ranks = []
        for rank in range(3):
            writer, _ = writer_of(
                Lagging(shared), state(1), structure=structure(rank, 3), rank=rank, world_size=3, save_id=SAVE
            )
            ranks.append(writer.run())
        results = await asyncio.gather(*ranks, return_exceptions=True)
        [record] = await read_records(shared, await shared.list())
        assert {isinstance(result, BaseException) for result in results} == {record.outcome == "abort"}
        assert await version_at(shared) == (record.outcome == "commit")

    with simulated():
        run(main())


@pytest.mark.parametrize("process", [True, False], ids=["process", "thread"])
def test_a_ring_smaller_than_everything(tmp_path: Path, process: bool) -> None:
    """One slot: tensors larger than the ring, more slabs than slots, strided ones cut at the edges of slabs."""
    wide = torch.arange(6_000_000, dtype=torch.int32).reshape(2000, 3000)
    wanted: dict[str, Any] = {
        "large": wide,
        "turned": wide.t(),
        "stepped": wide[::2, ::3],
        "small": torch.ones(3),
        "step": 0,
    }
    with AsyncCheckpointer(Options(staging_bytes=SLAB, save_deadline=50), process=process) as checkpointer:
        handles = [checkpointer.save(tmp_path / str(n), {**wanted, "step": n}) for n in range(3)]
        for number, handle in enumerate(handles):
            handle.result(50)
            found = checkpointer.load(tmp_path / str(number)).result(50)
            assert found["step"] == number
            assert all(torch.equal(found[name], wanted[name]) for name in ("large", "turned", "stepped", "small"))


def test_a_full_disk_that_is_freed() -> None:
    """The save that met it fails and leaves nothing; the old checkpoint is there; the next save works."""

    async def main() -> None:
        world = World()
        await world.save()
        used = sum(len(data or b"") for data in world.disk.image().values())
        world.disk.capacity = used + 9000
        with pytest.raises(StorageFull):
            await world.save()
        assert sum(len(data or b"") for data in world.disk.image().values()) < used + 9000
        await world.resume()
        world.disk.capacity = 1 << 40
        await world.save()
        assert await version_at(world.storage()) == 3

    with simulated():
        run(main())


def test_leftovers_of_the_killed_are_found() -> None:
    """Temporaries of claims and puts that were cut off can be listed, told by their object's name, and deleted."""

    async def main() -> None:
        left = 0
        for calls in range(1, 30):
            world = World()
            await world.try_to_save([calls])
            storage = world.storage()
            found = await storage.temporaries()
            hidden = {path.rpartition("/")[2] for path in world.disk.image() if "/." in path}
            assert set(found) == hidden
            await storage.delete([*found])
            assert await storage.temporaries() == {}
            left += len(found)
        assert left > 2

    with simulated():
        run(main())
