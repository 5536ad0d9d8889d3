"""Bad checkpoints: each is refused with a clear error that names file and tensor, or loads exactly what was saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from asyncdcp.envelope import _seal
from asyncdcp.errors import (
    AmbiguousCheckpoint,
    AsyncDCPError,
    CheckpointNotFound,
    ChecksumMismatch,
    CorruptCheckpoint,
    UnsupportedFormat,
)
from asyncdcp.names import index_name, record_name
from asyncdcp.pipeline.reader import CheckpointReader
from asyncdcp.storage import MemoryStorage
from tests.pipeline.forge import OTHER, SAVE, STATE, Forger, forger, read_all, save

INDEX, RECORD = index_name(SAVE, 0), record_name(SAVE)
Change = Callable[[dict[str, Any]], object]


async def refused(forged: Forger, kind: type[AsyncDCPError], *words: str, tensor: str | None = None) -> AsyncDCPError:
    with pytest.raises(kind) as caught:
        await CheckpointReader.open(forged.storage)
    assert type(caught.value) is kind
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value)) < 1000
    if tensor is not None:
        assert tensor in caught.value.tensors and tensor in str(caught.value)
    return caught.value


async def test_what_was_written_is_read() -> None:
    forged = await forger()
    loaded = await read_all(forged.storage)
    assert loaded.keys() == STATE.keys()
    assert all(np.array_equal(loaded[name], STATE[name]) for name in STATE)
    forged.index(lambda body: None)  # sealing again what was not changed changes nothing
    assert (await read_all(forged.storage)).keys() == STATE.keys()


# ── files as a whole ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("length", [0, 1, 5000, -1, -5])
async def test_truncated_data(length: int) -> None:
    forged = await forger()
    forged.objects[forged.data] = forged.objects[forged.data][:length]
    assert (await refused(forged, CorruptCheckpoint, forged.data, tensor="w")).path == forged.data


async def test_extended_data() -> None:
    forged = await forger()
    forged.objects[forged.data] += b"\0"
    await refused(forged, CorruptCheckpoint, forged.data, tensor="b")


async def test_missing_data() -> None:
    forged = await forger()
    del forged.objects[forged.data]
    await refused(forged, CorruptCheckpoint, forged.data, "missing", tensor="s")


@pytest.mark.parametrize("kind", ["index", "record"])
@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data[:100], lambda data: data + b" ", lambda _: b""]
)
async def test_truncated_or_extended_json(kind: str, change: Callable[[bytes], bytes]) -> None:
    forged = await forger()
    name = forged.names[kind]
    forged.objects[name] = change(forged.objects[name])
    assert (await refused(forged, CorruptCheckpoint, name)).path == name


async def test_missing_index() -> None:
    forged = await forger()
    del forged.objects[INDEX]
    await refused(forged, CorruptCheckpoint, INDEX, "missing")


@pytest.mark.parametrize("kind", ["index", "record"])
async def test_a_flipped_bit_anywhere_in_json(kind: str) -> None:
    forged = await forger({"w": np.arange(3, dtype=np.int16)})
    name, good = forged.names[kind], forged.objects[forged.names[kind]]
    for position in range(len(good)):
        forged.objects[name] = good
        forged.flip(name, position, 1 << position % 8)
        with pytest.raises(CorruptCheckpoint, match=name):
            await CheckpointReader.open(forged.storage)


@pytest.mark.parametrize("mask", [1, 4, 0x20, 0x80])
async def test_a_flipped_bit_anywhere_in_an_index_that_the_record_lists(mask: int) -> None:
    """The Index's own digest, without the Record's help."""
    forged = await forger({"w": np.arange(3, dtype=np.int16)})
    good = forged.objects[INDEX]
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= mask
        forged.put_index(bytes(bad))
        with pytest.raises(CorruptCheckpoint, match=INDEX):
            await CheckpointReader.open(forged.storage)


async def test_a_flipped_bit_in_data() -> None:
    forged = await forger()
    good = forged.objects[forged.data]
    assert len(good) == 4096 + 24015 == 28111
    for position, tensor in (
        (0, "s"),
        (8, "s"),
        (4095, "s"),
        (4096, "s"),
        (4104, "w"),
        (12000, "w"),
        (28103, "w"),
        (28110, "b"),
    ):
        forged.objects[forged.data] = good
        forged.flip(forged.data, position)
        if position < 4096:  # the header's block holds nothing that is loaded
            assert (await read_all(forged.storage)).keys() == STATE.keys()
            continue
        with pytest.raises(ChecksumMismatch, match=forged.data) as caught:
            await read_all(forged.storage)
        assert caught.value.block == position // 4096 and tensor in caught.value.tensors
        assert caught.value.path == forged.data and tensor in str(caught.value)


# ── envelopes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def sealed(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda data: msgspec.json.encode({**msgspec.json.decode(data), **changes})


@pytest.mark.parametrize("which", ["index", "record"])
@pytest.mark.parametrize(
    ("change", "kind", "word"),
    [
        (sealed(version=2), UnsupportedFormat, "version 2"),
        (sealed(version=0), UnsupportedFormat, "version 0"),
        (sealed(version=10**30), UnsupportedFormat, "newer"),
        (sealed(version="1"), CorruptCheckpoint, "version"),
        (sealed(format="pickle"), UnsupportedFormat, "pickle"),
        (sealed(format="x" * 10_000), UnsupportedFormat, "xxx"),
        (sealed(kind="other"), CorruptCheckpoint, "other"),
        (sealed(extra=1), CorruptCheckpoint, "extra"),
        (sealed(digest="0" * 32), CorruptCheckpoint, "digest"),
        (lambda data: b'{"weights": [1.0]}', UnsupportedFormat, "not a file of asyncdcp"),
        (lambda data: b"[]", CorruptCheckpoint, "envelope"),
        (lambda data: b"\x80\x04K\x01.", CorruptCheckpoint, "envelope"),
        (lambda data: data.replace(b'"body":', b'"body": '), CorruptCheckpoint, "digest"),
        (lambda data: b"[" * 1_000_000, CorruptCheckpoint, "envelope"),
        (lambda data: b'{"format":' + b"9" * 1_000_000 + b"}", CorruptCheckpoint, "envelope"),
    ],
)
async def test_envelopes(which: str, change: Callable[[bytes], bytes], kind: type[AsyncDCPError], word: str) -> None:
    forged = await forger()
    name = forged.names[which]
    bad = change(forged.objects[name])
    if which == "index":
        forged.put_index(bad)
    else:
        forged.objects[name] = bad
    await refused(forged, kind, name, word)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 1_000_000 + b"]" * 1_000_000,
        b'{"save_id":"\xff"}',
        b'{"save_id":"\xed\xa0\x80"}',
        b'{"save_id":' + b"9" * 5000 + b"}",
        b"null",
        b"{}",
    ],
)
@pytest.mark.parametrize("which", ["index", "record"])
async def test_bodies_that_are_no_such_thing(which: str, body: bytes) -> None:
    forged = await forger()
    data = _seal(which, body)
    if which == "index":
        forged.put_index(data)
    else:
        forged.objects[RECORD] = data
    await refused(forged, CorruptCheckpoint, forged.names[which])


async def test_invalid_utf8_in_what_only_a_later_layer_decodes() -> None:
    forged = await forger()
    body = msgspec.json.encode(forged.body("index")).replace(b'"step":1', b'"step":"\xff"')
    forged.put_index(_seal("index", body))
    await refused(forged, CorruptCheckpoint, INDEX)


async def test_deep_nesting_in_values() -> None:
    forged = await forger()
    nested = b'"step":' + b"[" * 1_000_000 + b"]" * 1_000_000
    forged.put_index(_seal("index", msgspec.json.encode(forged.body("index")).replace(b'"step":1', nested)))
    await refused(forged, CorruptCheckpoint, INDEX)


# ── the Record ──────────────────────────────────────────────────────────────────────────────────────────────────────


def ref(**changes: Any) -> Change:
    return lambda body: body["indexes"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda body: body.update(world_size=2), RECORD),
        (lambda body: body.update(world_size=0), RECORD),
        (lambda body: body.update(world_size=0, indexes=[]), RECORD),
        (lambda body: body.update(world_size=-1), RECORD),
        (lambda body: body.update(world_size=10**18), RECORD),
        (lambda body: body.update(indexes=body["indexes"] * 2), RECORD),
        (lambda body: body.update(indexes=body["indexes"] * 2, world_size=2), index_name(SAVE, 1)),
        (lambda body: body.update(save_id=OTHER), RECORD),
        (lambda body: body.update(save_id="../x"), RECORD),
        (lambda body: body.update(outcome="maybe"), RECORD),
        (lambda body: body.update(unknown=1), RECORD),
        (lambda body: body.update(time="now"), RECORD),
        (lambda body: body.update(replaces=[SAVE]), RECORD),
        (ref(name="../x"), INDEX),
        (ref(name="/etc/passwd"), INDEX),
        (ref(name=index_name(OTHER, 0)), INDEX),
        (ref(size=1 << 60), INDEX),
        (ref(size=-1), INDEX),
        (ref(size=10), INDEX),
        (ref(digest="0" * 32), INDEX),
    ],
)
async def test_records(change: Change, name: str) -> None:
    forged = await forger()
    forged.record(change)
    assert (await refused(forged, CorruptCheckpoint, name)).path == name


async def test_an_index_larger_than_any_may_be_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncdcp.pipeline.records.INDEX_LIMIT", 100)
    await refused(await forger(), CorruptCheckpoint, INDEX, "more than the 100")


async def test_the_index_of_another_save_or_rank() -> None:
    for change in ({"rank": 1}, {"save_id": OTHER}):
        forged = await forger()
        forged.index(lambda body, change=change: body.update(change))  # type: ignore[misc]  # bound in the loop
        await refused(forged, CorruptCheckpoint, INDEX, "another save or rank")


async def test_records_that_replace_each_other_in_a_circle() -> None:
    forged = await forger()
    await save(forged.storage, overwrite=True, save_id=OTHER)
    other = forged.body("record") if RECORD in forged.objects else None
    assert other is None  # the overwritten Record is gone
    again = await forger()
    again.record(lambda body: body.update(replaces=[OTHER]))
    forged.objects[RECORD] = again.objects[RECORD]
    await refused(forged, CorruptCheckpoint, "circle", RECORD)


async def test_a_commit_counts_beside_what_it_replaces() -> None:
    forged = await forger()
    left = dict(forged.objects)
    await save(forged.storage, {"new": np.zeros(2)}, overwrite=True, save_id=OTHER)
    forged.objects.update(left)  # as if deleting had been cut short
    assert (await read_all(forged.storage)).keys() == {"new"}


async def test_two_commits_blind_to_each_other() -> None:
    forged, other = await forger(), await forger(save_id=OTHER)
    forged.objects.update(other.objects)
    await refused(forged, AmbiguousCheckpoint, record_name(OTHER), RECORD, "here")


async def test_only_an_abort() -> None:
    forged = await forger()
    forged.record(lambda body: body.update(outcome="abort", rank=3, cause="deadline: too slow"))
    await refused(forged, CheckpointNotFound, "here", "rank 3", "too slow")


async def test_nothing_at_all() -> None:
    with pytest.raises(CheckpointNotFound, match="nowhere"):
        await CheckpointReader.open(MemoryStorage("nowhere"))


# ── the Index ───────────────────────────────────────────────────────────────────────────────────────────────────────
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
        (plan(held={"tensor": [9], "offsets": [], "sizes": []}), "not listed", None),
        (plan(held={"tensor": [1], "offsets": [5], "sizes": [3]}), "leaves its shape", "b"),
        (plan(held={"tensor": [1], "offsets": [], "sizes": []}), "dimensions", None),
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
    assert (await refused(forged, CorruptCheckpoint, INDEX, word, tensor=tensor)).path == INDEX


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
