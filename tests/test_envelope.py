"""Round trips, and flipped bits; what else is refused stands in ``pipeline/test_hostile_files.py``."""

from __future__ import annotations

import msgspec
import pytest

from asyncdcp.envelope import IndexHead, decode_index, decode_record, encode_index, encode_record
from asyncdcp.errors import CorruptCheckpoint
from asyncdcp.metadata import FileTable, IndexRef, Record, Summary
from asyncdcp.planning import plan_save
from tests.pipeline.forge import SAVE, STATE, structure_of


def test_a_record_comes_back() -> None:
    commit = Record(
        save_id=SAVE,
        outcome="commit",
        time=1.5,
        world_size=1,
        versions={"torch": "2"},
        replaces=["b"],
        indexes=[IndexRef("n", 1, "d")],
        summary=Summary(1, 2, 3, ["zstd"]),
        metadata={"ü": [1, None, {"x": 2.5}]},
        term=4,
        parent="p",
    )
    abort = Record(save_id=SAVE, outcome="abort", time=0.0, world_size=2, versions={}, rank=1, cause='"]}\n')
    for record in (commit, abort):
        assert decode_record(encode_record(record), "r") == record


def test_an_index_comes_back() -> None:
    plan = plan_save(structure_of(STATE))
    files = [FileTable("f", 5, bytes(range(256)), [1, 2]), FileTable("g", 0, b"")]
    data = encode_index(IndexHead(SAVE, 3, 4096, ["a", "b"]), plan.index_plan, b'{"k": [1]}', files)
    index = decode_index(data, "i")
    assert (index.save_id, index.rank, index.block_bytes, index.transforms) == (SAVE, 3, 4096, ["a", "b"])
    assert index.files == files and bytes(index.values["k"]) == b"[1]"
    assert index.plan.names == list(STATE) and index.plan.shapes == [(60, 100), (7,), ()]
    assert msgspec.json.decode(index.plan.tree) == {"t": "w"}
    assert index.plan.written.begin == [4096, 4104, 28104]


def test_kinds_are_not_mistaken() -> None:
    record = encode_record(Record(save_id=SAVE, outcome="abort", time=0.0, world_size=2, versions={}))
    with pytest.raises(CorruptCheckpoint, match="r: is a 'record', expected a 'index'"):
        decode_index(record, "r")


@pytest.mark.parametrize("mask", [1, 4, 0x20, 0x80])
def test_a_flipped_bit_anywhere_in_an_index_is_found(mask: int) -> None:
    """By its own digest, without the help of the Record that lists it."""
    plan = plan_save(structure_of({"w": STATE["b"]}))
    good = encode_index(IndexHead(SAVE, 0, 4096, []), plan.index_plan, b'{"k":1}', [FileTable("f", 5, bytes(8))])
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= mask
        with pytest.raises(CorruptCheckpoint, match=r"^i: "):
            decode_index(bytes(bad), "i")
