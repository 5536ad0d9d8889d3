"""verify says all that is wrong with a checkpoint, and nothing of one that is whole."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from asyncdcp.errors import AmbiguousCheckpoint, CheckpointNotFound
from asyncdcp.pipeline.union import enumerated
from asyncdcp.pipeline.verify import verify
from asyncdcp.results import Damage
from asyncdcp.runs.history import stage_times
from asyncdcp.storage import LocalStorage, MemoryStorage
from asyncdcp.storage.memory import MemoryReader
from asyncdcp.storage.posix import OS
from asyncdcp.trace import Span, Trace
from tests.pipeline.forge import BLOCK, OTHER, STATE, Arrays, Forger, forger, save

LONG: Arrays = {"a": np.arange(40_000, dtype=np.float32), "b": np.ones(3), "c": np.zeros(9000)}


async def damages(storage: MemoryStorage | LocalStorage) -> list[Damage]:
    return list((await verify(storage, Trace())).damages)


@pytest.mark.parametrize("kind", ["memory", "local"])
async def test_a_whole_checkpoint(kind: str, tmp_path: Path) -> None:
    storage = MemoryStorage() if kind == "memory" else LocalStorage(tmp_path)
    await save(storage, LONG, file_limit=1 << 17)
    spans: list[tuple[Span, int]] = []
    report = await verify(storage, Trace(lambda span, total: spans.append((span, total))))
    data = {name: size for name, size in (await storage.list()).items() if name.endswith(".safetensors")}
    assert report.ok and report.damages == ()
    assert (report.files, report.bytes) == (len(data), sum(data.values()))
    assert report.files > 1
    assert report.blocks == sum(-(-size // BLOCK) for size in data.values())
    assert sum(span.bytes for span, _ in spans) == report.bytes == spans[0][1]


async def test_every_damaged_block_is_found_with_what_lies_in_it() -> None:
    made = await forger(LONG)
    count = -(-len(made.objects[made.data]) // BLOCK)
    wanted = [0, 7, count - 1]
    for block in wanted:
        made.flip(made.data, block * BLOCK + 17)
    found = await damages(made.storage)
    assert sorted(damage.block or 0 for damage in found) == wanted
    assert {damage.kind for damage in found} == {"checksum"}
    assert all(damage.file == made.data for damage in found)
    [inner] = [damage for damage in found if damage.block == 7]
    assert inner.tensors and set(inner.tensors) <= set(LONG)
    assert inner.tensors[0] in inner.message and "block 7" in inner.message


@pytest.mark.parametrize("byte", range(0, 24_000, 1499))
async def test_any_byte(byte: int) -> None:
    made = await forger(STATE)
    made.flip(made.data, byte % len(made.objects[made.data]), 0x80)
    assert len(await damages(made.storage)) == 1


async def test_all_files_are_looked_at() -> None:
    """Several files at fault: each is reported, and the rest is verified."""
    storage = MemoryStorage("here")
    await save(storage, LONG, file_limit=1 << 16)
    made = Forger(storage)
    data = sorted(name for name in made.objects if name.endswith(".safetensors"))
    del made.objects[data[0]]
    made.objects[data[1]] += b"x"
    made.objects[data[2]] = made.objects[data[2]][:-1]
    made.flip(data[3], 5000)
    trace = Trace()
    report = await verify(storage, trace)
    found, read = report.damages, sum(len(made.objects[name]) for name in data[3:])
    assert report.files == len(data) - 3 and report.bytes == read == trace.total
    assert stage_times(trace.spans)["verify"].bytes == read
    assert [(damage.kind, damage.file) for damage in sorted(found, key=lambda damage: damage.file)] == [
        *(("missing", data[0]), ("size", data[1]), ("size", data[2]), ("checksum", data[3]))
    ]


@pytest.mark.parametrize("kind", ["index", "record"])
async def test_damaged_descriptions(kind: str) -> None:
    made = await forger()
    made.flip(made.names[kind], 150)
    [damage] = await damages(made.storage)
    assert (damage.kind, damage.file) == (kind, made.names[kind])


async def test_a_missing_index() -> None:
    made = await forger()
    del made.objects[made.names["index"]]
    [damage] = await damages(made.storage)
    assert (damage.kind, damage.file) == ("index", made.names["index"])


@pytest.mark.parametrize(
    "change",
    [
        {"lengths": [1 << 60]},
        {"lengths": [-5, 5]},
        {"stored_size": 0},
        {"stored_size": 1 << 60},
        {"checksums": ""},
        {"checksums": "AAAA"},
        {"name": "../../etc/passwd"},
    ],
)
async def test_a_forged_index_is_reported_and_harms_nobody(change: dict[str, object]) -> None:
    made = await forger()
    made.index(lambda body: body["files"][0].update(change))
    found = await damages(made.storage)
    assert found and {damage.kind for damage in found} <= {"index", "size", "missing"}


async def test_a_record_that_lists_too_few() -> None:
    made = await forger()
    made.record(lambda body: body.update(world_size=2))
    assert [damage.kind for damage in await damages(made.storage)] == ["record"]


async def test_blocks_that_cannot_be_read(tmp_path: Path) -> None:
    class Bad(OS):
        """A bad sector."""

        def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
            count = super().preadv(fd, buffers, offset, flags)
            if offset <= 3 * BLOCK + 5 < offset + count and count > 3000:
                raise OSError(errno.EIO, "Input/output error")
            return count

    await save(LocalStorage(tmp_path), LONG)
    found = await damages(LocalStorage(tmp_path, posix=Bad()))
    assert [(damage.kind, damage.block) for damage in found] == [("unreadable", 3)]
    assert "Input/output error" in found[0].message


async def test_what_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound):
        await verify(LocalStorage(tmp_path / "nothing"), Trace())
    storage, other = MemoryStorage(), MemoryStorage()
    await save(storage)
    await save(other, save_id=OTHER)
    storage._objects.update(other._objects)
    with pytest.raises(AmbiguousCheckpoint):
        await verify(storage, Trace())


async def test_a_checkpoint_that_is_replaced_meanwhile() -> None:
    class Replaced(MemoryStorage):
        """A save over it ends while it is read."""

        opened = 0

        async def open(self, name: str) -> MemoryReader:
            self.opened += 1
            if self.opened == 2:
                await save(self, STATE, save_id=OTHER, overwrite=True)
            return await super().open(name)

    storage = Replaced()
    await save(storage, LONG, file_limit=1 << 16)
    report = await verify(storage, Trace())
    assert report.ok and report.save_id == OTHER


def test_a_tensor_is_named_once_however_many_of_its_chunks_are_damaged() -> None:
    assert enumerated(["w", "w", "b"]) == "w, b"
    assert enumerated(["w", *"abcd", "d"]) == "w, a, b, c, d"
    assert enumerated(["w", *"abcde"]) == "w, a, b, c, d …"
    assert enumerated([]) == "only a header"
