"""What the port promises, of every Storage, by the public kit; and that the kit finds what breaks a promise."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from asyncdcp.storage import LocalStorage, MemoryStorage, Storage
from asyncdcp.storage.memory import MemoryWriter
from asyncdcp.testing.storage import STORAGE_CHECKS, Check, StorageKit, contents, lifetimes, names

pytestmark = pytest.mark.usefixtures("no_leaks")


def local_kit(root: Path, *, direct_io: bool = True) -> StorageKit:
    numbers = itertools.count()

    def make() -> Storage:
        return LocalStorage(root / str(next(numbers)) / "deep", direct_io=direct_io)

    return StorageKit(make, lambda storage: LocalStorage(storage.info.location, direct_io=direct_io))


@pytest.fixture(params=["direct", "buffered", "shm", "memory"])
def kit(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StorageKit]:
    if request.param == "memory":
        yield StorageKit(MemoryStorage)
    elif request.param == "shm":
        if not os.path.isdir("/dev/shm"):
            pytest.skip("no /dev/shm")
        path = tempfile.mkdtemp(dir="/dev/shm")
        yield local_kit(Path(path))
        shutil.rmtree(path)
    else:
        yield local_kit(tmp_path, direct_io=request.param == "direct")


@pytest.mark.parametrize("check", STORAGE_CHECKS, ids=lambda check: check.__name__)
async def test_promises(kit: StorageKit, check: Check) -> None:
    await check(kit)


# ── the kit finds faults ──


class Forgetful(MemoryStorage):
    """Puts a byte less than it is given."""

    async def claim(self, name: str, data: bytes) -> bool:
        return await super().claim(name, data[:-1])


class Generous(MemoryStorage):
    """Lets everybody win."""

    async def claim(self, name: str, data: bytes) -> bool:
        await super().claim(name, data)
        return True


class Overwriting(MemoryStorage):
    async def put(self, name: str, data: bytes) -> None:
        self._objects.pop(name, None)
        await super().put(name, data)


class Blind(MemoryStorage):
    """Does not see names that are no names."""

    async def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self._objects.pop(name, None)


class Leaving(MemoryStorage):
    async def temporaries(self) -> dict[str, str]:
        return dict.fromkeys((f".{name}" for name in self._objects), "x")


class Unlimited(MemoryStorage):
    async def get(self, name: str, limit: int) -> bytes:
        return await super().get(name, 1 << 40)


class Keeping(MemoryStorage):
    """Its aborted objects stay."""

    async def create(self, name: str, length_hint: int) -> MemoryWriter:
        writer = await super().create(name, length_hint)
        self._objects.setdefault(name, b"")
        return writer


@pytest.mark.parametrize(
    ("faulty", "found"),
    [
        (Forgetful, names.what_exists_is_not_made_again),
        (Generous, names.of_many_claims_one_wins),
        (Overwriting, names.what_exists_is_not_made_again),
        (Blind, names.bad_names_are_refused),
        (Leaving, names.nothing_is_left_of_what_ended),
        (Unlimited, contents.get_keeps_its_limit),
        (Keeping, lifetimes.abort_leaves_nothing_and_frees_the_name),
    ],
)
async def test_the_kit_fails_for_what_breaks_a_promise(faulty: type[MemoryStorage], found: Check) -> None:
    with pytest.raises(AssertionError):
        await found(StorageKit(faulty))
