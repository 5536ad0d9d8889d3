"""Indexes that lie: numbers that contradict each other, the file or the format. Each is refused, naming the tensor."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import numpy as np
import pytest

from asyncdcp.errors import CorruptCheckpoint, StructureChanged, UnsupportedFormat
from asyncdcp.pipeline.reader import CheckpointReader
from asyncdcp.storage import MemoryStorage
from tests.pipeline.forge import (
    INDEX,
    OTHER,
    SAVE,
    STATE,
    Change,
    forger,
    read_all,
    refused,
    structure_of,
    writer_of,
)

# STATE's order in the file: s (8 bytes at 4096), w (24,000 bytes at 4104), b (7 bytes at 28104).
# As columns: tensors w, b, s; chunk rows s, w, b.


def plan(**changes: Any) -> Change:
    return lambda body: body["plan"].update(changes)


def written(column: str, row: int, value: Any) -> Change:
    return lambda body: body["plan"]["written"][column].__setitem__(row, value)


def table(**changes: Any) -> Change:
    return lambda body: body["files"][0].update(changes)


def image(**changes: Any) -> Change:
    return lambda body: body["plan"]["images"][0].update(changes)


def shapes(**changes: Any) -> Change:
    return lambda body: body["plan"].update(
        shapes=[changes.get(n, s) for n, s in zip("wbs", body["plan"]["shapes"], strict=True)]
    )


def added(column: str, *values: Any) -> Change:
    return lambda body: body["plan"]["written"][column].extend(values)


@pytest.mark.parametrize(
    ("change", "word", "tensor"),
    [
        # counts and shapes
        (plan(names=["w", "b"]), "number", None),
        (plan(dtypes=["float32"]), "number", None),
        (plan(shapes=[]), "number", None),
        (plan(names=["w", "w", "s"]), "twice", None),
        (shapes(w=[1 << 62, 1 << 62]), "impossible shape", "w"),
        (shapes(w=[10**400]), "impossible shape", "w"),
        (shapes(w=[10**18]), "dimensions", None),
        (shapes(w=[0, 10**30]), "impossible shape", "w"),
        (shapes(w=[1] * 1_000), "impossible shape", "w"),
        (shapes(w=[-60, -100]), "impossible shape", "w"),
        (shapes(w=[60, 101]), "hole", "w"),
        (shapes(w=[60, 99]), "leaves its shape", "w"),
        (shapes(w=[6000]), "dimensions", None),
        # chunks
        (written("tensor", 0, 3), "not listed", None),
        (written("tensor", 0, -1), "not listed", None),
        (written("tensor", 0, 10**18), "not listed", None),
        (written("sizes", 0, -60), "leaves its shape", "w"),
        (written("sizes", 0, 1 << 61), "leaves its shape", "w"),
        (written("sizes", 0, 59), "hole", "b"),
        (written("offsets", 0, 1), "leaves its shape", "w"),
        (written("offsets", 0, -1), "leaves its shape", "w"),
        (written("offsets", 0, 10**30), "leaves its shape", "w"),
        (written("file", 1, 1), "file that is not listed", "w"),
        (written("file", 1, -1), "file that is not listed", "w"),
        (written("begin", 0, 4095), "within an element", "s"),
        (written("begin", 0, 4088), "overlapping", "s"),
        (written("begin", 0, 4104), "hole before a chunk", "s"),
        (written("begin", 2, 28103), "overlapping", "b"),
        (written("begin", 2, 28105), "hole before a chunk", "b"),
        (written("begin", 1, -4096), "overlapping", "w"),
        (written("begin", 1, 1 << 60), "hole before a chunk", "b"),
        (added("tensor", 0), "columns", None),
        (added("offsets", 0), "dimensions", None),
        (added("sizes", *[1] * 1000), "dimensions", None),
        # tables
        (lambda body: body.update(block_bytes=1 << 60), "blocks of", None),
        (lambda body: body.update(block_bytes=0), "blocks of", None),
        (lambda body: body.update(block_bytes=-4096), "blocks of", None),
        (lambda body: body.update(block_bytes=4097), "blocks of", None),
        (lambda body: body.update(block_bytes=8192), "checksums", None),
        (lambda body: body.update(files=[]), "differ in number", None),
        (lambda body: body.update(files=body["files"] * 2), "differ in number", None),
        (table(name="../x"), "cannot be named", None),
        (table(name="/etc/passwd"), "cannot be named", None),
        (table(name=f"{OTHER}-0-0.safetensors"), "cannot be named", None),
        (table(name=f"{SAVE}-1-0.safetensors"), "cannot be named", None),
        (table(name="y" * 100_000), "cannot be named", None),
        (table(stored_size=5), "is stored in 5", None),
        (table(lengths=[4096]), "lengths of blocks without transforms", None),
        (table(checksums="AAAA"), "checksums", None),
        (table(checksums=""), "checksums", None),
        (image(size=10**18), "stored in", None),
        (image(size=-1), "impossible size", None),
        (image(data_start=0), "impossible size", None),
        (image(data_start=1 << 50), "impossible size", None),
        (image(data_start=4104), "overlapping", "s"),
        (image(data_start=2048), "hole before a chunk", "s"),
        # aliases
        (plan(aliases={"t": "nothing"}), "alias t", "t"),
        (plan(aliases={"t": "u", "u": "t"}), "alias t", "t"),
        (plan(aliases={"t": "t"}), "alias t", "t"),
        (plan(aliases={"w": "b"}), "alias w", "w"),
        (plan(aliases={"step": "b"}), "alias step", "step"),
        (plan(aliases={"t": "w"}, own=["w"]), "w is the rank's own", "t"),
        # values
        (lambda body: body["values"].update(w=1), "both as a tensor and as a value", "w"),
        # schema
        (plan(more=1), "schema", None),
        (plan(names="wbs"), "schema", None),
        (shapes(w=[1.5]), "schema", None),
        (table(checksums="not base64!"), "schema", None),
        (lambda body: body.pop("plan"), "schema", None),
        (lambda body: body.update(rank="0"), "schema", None),
    ],
)
async def test_indexes(change: Change, word: str, tensor: str | None) -> None:
    forged = await forger()
    forged.index(change)
    assert (await refused(forged, CorruptCheckpoint, INDEX, word, tensor=tensor)).path == f"here/{INDEX}"


async def test_a_file_listed_twice() -> None:
    forged = await forger()

    def twice(body: dict[str, Any]) -> None:
        body["files"] *= 2
        body["plan"]["images"] *= 2

    forged.index(twice)
    await refused(forged, CorruptCheckpoint, INDEX, "file number 1 cannot be named")


async def test_a_file_and_its_index_cut_alike() -> None:
    """Size, image and table agree with each other, and the chunks do not."""
    forged = await forger()
    forged.objects[forged.data] = forged.objects[forged.data][:-1]
    forged.index(lambda body: (table(stored_size=28110)(body), image(size=28110)(body)))
    await refused(forged, CorruptCheckpoint, INDEX, "end at byte 28111 of 28110")


async def test_what_this_version_does_not_have() -> None:
    forged = await forger()
    forged.index(lambda body: body.update(transforms=["zstd"]))
    await refused(forged, UnsupportedFormat, INDEX, "zstd")
    forged = await forger()
    forged.index(plan(dtypes=["float32", "float7", "float64"]))
    await refused(forged, UnsupportedFormat, INDEX, "float7", tensor="b")


async def test_an_alias_and_an_empty_tensor() -> None:
    arrays = {**STATE, "empty": np.zeros((0, 3), np.float16)}
    forged = await forger(arrays)
    forged.index(plan(aliases={"tied": "w"}))
    async with await CheckpointReader.open(forged.storage) as reader:
        assert reader.metadata.aliases == {"tied": "w"}
        assert reader.metadata.storage_meta.user == {"note": "ü"}
    assert (await read_all(forged.storage))["empty"].shape == (0, 3)


async def test_what_is_a_value_on_one_rank_and_tied_on_another() -> None:
    storage = MemoryStorage("here")
    arrays = {"w": np.arange(4.0)}
    jobs: list[dict[str, Any]] = [
        {"structure": structure_of(arrays), "values": msgspec.Raw(b'{"t":1}')},
        {"structure": structure_of(arrays, rank=1, aliases={"t": "w"}), "values": msgspec.Raw(b"{}")},
    ]
    writers = [writer_of(storage, arrays, world_size=2, rank=rank, **job)[0] for rank, job in enumerate(jobs)]
    found = await asyncio.gather(*(writer.run() for writer in writers), return_exceptions=True)
    assert all(isinstance(error, StructureChanged) and "t is a value" in str(error) for error in found), found
