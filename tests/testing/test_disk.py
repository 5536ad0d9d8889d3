"""The simulated disk against what it stands for: the same answers as a real one, and every state that a loss leaves."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from asyncdcp.errors import StorageFull
from asyncdcp.storage import LocalStorage
from asyncdcp.testing.disk import SimulatedDisk
from asyncdcp.testing.power import remains
from asyncdcp.testing.storage import STORAGE_CHECKS, Check, StorageKit, page_buffer


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("check", STORAGE_CHECKS, ids=lambda check: check.__name__)
async def test_a_storage_on_it_keeps_its_promises(check: Check, direct: bool) -> None:
    disks: dict[str, SimulatedDisk] = {}
    numbers = itertools.count()

    def make() -> LocalStorage:
        path = f"/{next(numbers)}/deep"
        disks[path] = SimulatedDisk(direct=direct)
        return again(path)

    def again(path: str) -> LocalStorage:
        return LocalStorage(path, posix=disks[path])

    await check(StorageKit(make, lambda storage: again(storage.info.location)))
    assert not [path for disk in disks.values() for path in disk.open_files]


def written(disk: SimulatedDisk, path: str, data: bytes, *, sync: bool = False) -> None:
    fd = disk.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    disk.pwrite(fd, memoryview(data), 0)
    if sync:
        disk.fsync(fd)
    disk.close(fd)


def synced(disk: SimulatedDisk, path: str) -> None:
    fd = disk.open(path, os.O_RDONLY | os.O_DIRECTORY)
    disk.fsync(fd)
    disk.close(fd)


def left(disk: SimulatedDisk) -> list[dict[str, bytes | None]]:
    return sorted(remains(disk, 1000), key=repr)


def test_what_is_synced_is_there_and_what_is_not_may_be() -> None:
    disk = SimulatedDisk()
    written(disk, "/a", b"x", sync=True)
    assert left(disk) == [{"/a": b"x"}, {}]
    synced(disk, "/")
    assert left(disk) == [{"/a": b"x"}]
    disk.unlink("/a")
    assert left(disk) == [{"/a": b"x"}, {}]


def test_a_name_without_its_bytes() -> None:
    disk = SimulatedDisk()
    written(disk, "/a", b"x")
    synced(disk, "/")
    assert left(disk) == [{"/a": b""}, {"/a": b"x"}]


def test_writes_are_torn_dropped_and_reordered() -> None:
    disk = SimulatedDisk({"/a": b"-" * 10240})
    fd = disk.open("/a", os.O_WRONLY)
    disk.pwrite(fd, memoryview(b"1" * 10240), 0)
    disk.pwrite(fd, memoryview(b"2" * 512), 9728)
    found = {bytes(image["/a"] or b"") for image in left(disk)}
    one, two = b"1" * 10240, b"2" * 512
    assert b"-" * 10240 in found and one in found and one[:9728] + two in found
    assert b"-" * 9728 + two in found, "the second without the first"
    for cut in (512, 4096, 8192):
        assert one[:cut] + b"-" * (10240 - cut) in found, "the beginning of the first"
        assert b"-" * cut + one[cut:] in found, "its end"


def test_a_rename_is_there_or_not() -> None:
    disk = SimulatedDisk({"/a": b"x"})
    disk.rename_noreplace("/a", "/b")
    assert left(disk) == [{"/a": b"x"}, {"/b": b"x"}]


def test_a_link_and_the_end_of_the_other_name_are_two_things() -> None:
    disk = SimulatedDisk({"/t": b"x"})
    disk.link("/t", "/a")
    disk.unlink("/t")
    assert left(disk) == [{"/a": b"x"}, {"/t": b"x", "/a": b"x"}, {"/t": b"x"}, {}]


def test_a_directory_takes_what_is_in_it_along() -> None:
    disk = SimulatedDisk()
    disk.mkdir("/d")
    written(disk, "/d/a", b"x", sync=True)
    synced(disk, "/d")
    assert left(disk) == [{"/d": None, "/d/a": b"x"}, {}]


def test_a_sample_is_bounded_and_the_same_every_time() -> None:
    disk = SimulatedDisk()
    for number in range(12):
        written(disk, f"/{number}", b"x" * 9000)
    first = list(remains(disk, 500, seed=3))
    assert first == list(remains(disk, 500, seed=3))
    assert {} in first and disk.image() in first
    assert 100 < len(first) <= 500


async def test_a_full_disk(tmp_path: Path) -> None:
    storage = LocalStorage("/p", posix=SimulatedDisk(capacity=10_000))
    writer = await storage.create("a", 0)
    await writer.write(0, page_buffer(bytes(8192)))
    with pytest.raises(StorageFull):
        await writer.write(8192, page_buffer(bytes(4096)))
    await writer.abort()
    with pytest.raises(StorageFull):
        await storage.create("b", 20_000)
    await storage.put("c", b"fits")
