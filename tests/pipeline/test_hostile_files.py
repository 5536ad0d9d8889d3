"""Bad checkpoints: files cut, damaged, missing or of something else; Records that lie. Each is refused with a clear
error that names file and tensor, or loads exactly what was saved. Indexes that lie: ``test_hostile_index.py``.
"""

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
from tests.pipeline.forge import INDEX, OTHER, RECORD, SAVE, STATE, Change, forger, read_all, refused, save


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
    assert (await refused(forged, CorruptCheckpoint, forged.data, tensor="w")).path == f"here/{forged.data}"


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
    assert (await refused(forged, CorruptCheckpoint, name)).path == f"here/{name}"


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
        assert caught.value.path == f"here/{forged.data}" and tensor in str(caught.value)


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
    assert (await refused(forged, CorruptCheckpoint, name)).path == f"here/{name}"


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
