"""Places of other formats are opened by readers that are found by entry point."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from asyncdcp.errors import CheckpointNotFound, InvalidOption, UsageError
from asyncdcp.metadata import (
    ChunkLocation,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from asyncdcp.pipeline.formats import ForeignPlace, open_checkpoint
from asyncdcp.pipeline.reader import RangeReader
from asyncdcp.pipeline.union import FileMap
from asyncdcp.pipeline.windows import ReadRange
from asyncdcp.storage import LocalStorage, MemoryStorage
from asyncdcp.storage.local import ForeignDirectory
from asyncdcp.trace import Trace

Install = Callable[..., None]


class Raw(RangeReader):
    """A format of one file that is a tensor of bytes, and nothing else."""

    def __init__(self, place: ForeignPlace, name: str, size: int) -> None:
        super().__init__(place.storage, {name: FileMap(name, size, 4096, None, [0], ["x"])})
        chunk = ChunkStorageMetadata((0,), (size,))
        self.metadata = Metadata(
            {"x": TensorStorageMetadata(TensorProperties("uint8"), (size,), (chunk,))},
            {MetadataIndex("x", (0,)): ChunkLocation(name, 0, size)},
            StorageMeta(place.storage.info.location, "raw", 1, 0.0, {}),
            {},
            msgspec.Raw(b'{"dict":[["x"],[{"t":"x"}]]}'),
            {},
        )


async def open_raw(place: ForeignPlace) -> Raw | None:
    for name, size in (await place.storage.list()).items():
        if name.endswith(".raw data") and place.name in (None, name):
            return Raw(place, name, size)
    return None


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes readers known as an installed package would; the others that are installed stay."""

    def install(**readers: str) -> None:
        info = tmp_path / "site" / "formats-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: formats\nVersion: 1.0\n")
        lines = [f"{name} = {target}" for name, target in readers.items()]
        (info / "entry_points.txt").write_text("\n".join(["[asyncdcp.readers]", *lines]))
        monkeypatch.syspath_prepend(tmp_path / "site")
        monkeypatch.setitem(sys.modules, "raw_format", sys.modules[__name__])

    return install


@pytest.mark.parametrize("whole", [True, False])
async def test_a_reader_opens_a_directory_or_a_file(tmp_path: Path, install: Install, whole: bool) -> None:
    install(raw="raw_format:open_raw")
    place = tmp_path / "place"
    place.mkdir()
    (place / ".a name.raw data").write_bytes(bytes(range(100)) * 100)
    found = await open_checkpoint(LocalStorage(place if whole else place / ".a name.raw data"))
    into = bytearray(5000)
    await found.read([ReadRange(".a name.raw data", 50, 5050, memoryview(into), None)], Trace())
    await found.aclose()
    assert into == (bytes(range(100)) * 100)[50:5050]
    assert found.metadata.storage_meta.save_id == "raw"


async def test_what_no_reader_knows_is_not_found(tmp_path: Path, install: Install) -> None:
    install(raw="raw_format:open_raw")
    for storage in (LocalStorage(tmp_path / "nowhere"), LocalStorage(Path(__file__)), MemoryStorage("memory")):
        with pytest.raises(CheckpointNotFound, match=f"no checkpoint at {storage.info.location}"):
            await open_checkpoint(storage)


async def test_a_reader_that_cannot_be_loaded_hides_no_other_and_is_named(tmp_path: Path, install: Install) -> None:
    install(broken="no_such_module:reader", raw="raw_format:open_raw")
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(CheckpointNotFound, match=r"no checkpoint at .*reader of broken could not be loaded.*no_such"):
        await open_checkpoint(LocalStorage(place))
    (place / "x.raw data").write_bytes(b"abc")
    await (await open_checkpoint(LocalStorage(place))).aclose()


async def test_foreign_places_are_read_only_and_flat(tmp_path: Path) -> None:
    storage = ForeignDirectory(tmp_path)
    for name in ("", ".", "..", "a/b", "/etc/passwd", "a\0b"):
        with pytest.raises(InvalidOption, match="not a file's name"):
            await storage.open(name)
    for refused in (storage.create("a", 0), storage.put("a", b""), storage.claim("a", b""), storage.delete(["a"])):
        with pytest.raises(UsageError, match="for reading only"):
            await refused
    assert await storage.list() == {}
