"""The wire protocol: what is written is read, and what another process makes up is refused."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from asyncdcp.errors import AsyncDCPError, CorruptCheckpoint, PeerError, UnsupportedFormat
from asyncdcp.metadata import ChunkColumns
from asyncdcp.state_dict.flatten import flatten
from asyncdcp.state_dict.structure import describe
from asyncdcp.transport import wire
from asyncdcp.transport.offered import LayoutCache
from asyncdcp.transport.stream import LARGE_BYTES, plan_stream
from asyncdcp.transport.wire import Accept, Done, Failure, Offer, StreamPlan, Tick, Verdict
from asyncdcp.worker.protocol import ErrorFrame


def offer_of(state: Any, block_bytes: int = 4096) -> Offer:
    flat = flatten(state)
    stream = plan_stream(describe(flat).structure, block_bytes)
    return Offer(3, True, msgspec.Raw(stream.encoded), msgspec.Raw(msgspec.json.encode(flat.values)))


def test_messages_come_back() -> None:
    failure = Failure(ErrorFrame("StateMismatch", "no", {"missing": ["a"]}))
    for message in (offer_of({"w": torch.ones(3), "n": 1}), Accept(2), Done(7), failure):
        head, body = wire.encode(message)
        assert len(head) == wire.HEAD_BYTES
        found = wire.decode(wire.decode_head(head, 3), body, 3)
        assert msgspec.json.encode(found) == body


def test_ticks_come_back() -> None:
    tick = Tick(5, Verdict.STOP, tuple(range(wire.BATCH_BLOCKS)))
    data = wire.encode_tick(tick)
    assert len(data) == wire.TICK_BYTES
    assert wire.decode_tick(data, 5, 0) == tick
    for number, content in ((6, data), (5, bytes([data[0] ^ 1]) + data[1:]), (5, data[:-1] + b"\0")):
        with pytest.raises(CorruptCheckpoint, match="rank 0 sent something else than tick"):
            wire.decode_tick(content, number, 0)


def test_other_heads_are_refused() -> None:
    head, body = wire.encode(Accept(1))
    with pytest.raises(PeerError, match="no message of a transfer"):
        wire.decode_head(b"x" + head[1:], 4)
    with pytest.raises(UnsupportedFormat, match=r"rank 4 speaks version 2 .* this one version 1"):
        wire.decode_head(head[:8] + b"\2" + head[9:], 4)
    with pytest.raises(PeerError, match="announces a message of"):
        wire.decode_head(head[:16] + b"\xff" * 8 + head[24:], 4)
    with pytest.raises(CorruptCheckpoint, match="does not match its checksum"):
        wire.decode(wire.decode_head(head, 4), body + b" ", 4)
    parts = msgspec.json.encode({"type": "Nonsense"})
    with pytest.raises(CorruptCheckpoint, match="malformed"):
        wire.decode(wire.Head(len(parts), xxhash.xxh3_64_intdigest(parts)), parts, 4)


def test_an_offer_says_where_everything_lies() -> None:
    big = torch.zeros(LARGE_BYTES // 4)
    state = {"big": big, "a": torch.zeros(3, dtype=torch.float64), "b": torch.zeros(0), "n": 1}
    layout = LayoutCache().read(offer_of(state)).layout
    assert [(chunk.name, chunk.begin, chunk.end) for chunk in layout.chunks] == [
        ("a", 0, 24),
        ("big", 24, 24 + LARGE_BYTES),
    ]
    assert layout.borders[:3] == [0, 24, 24 + 4096]
    assert layout.tensors_in(0) == ["a"]
    assert layout.tensors_in(1) == ["big"]
    assert layout.of["b"] == []


def test_a_layout_that_comes_again_is_not_read_again() -> None:
    cache = LayoutCache(limit=2)
    first, again, other = (
        cache.read(offer_of({"a": torch.zeros(size), "n": number})) for size, number in ((3, 1), (3, 2), (4, 3))
    )
    assert again.layout is first.layout
    assert [bytes(each.values["n"]) for each in (first, again)] == [b"1", b"2"]
    assert other.layout.plan.shapes == [(4,)]
    with pytest.raises(CorruptCheckpoint, match="a is both a tensor and a value"):
        cache.read(structs.replace(offer_of({"a": torch.zeros(3)}), values=msgspec.Raw(b'{"a": 1}')))
    cache.read(offer_of({"b": torch.zeros(1)}))
    cache.read(offer_of({"c": torch.zeros(1)}))
    assert cache.read(offer_of({"a": torch.zeros(3), "n": 1})).layout is not first.layout, "only the last few are kept"


def changed(offer: Offer, **fields: Any) -> Offer:
    plan = structs.replace(msgspec.json.decode(offer.plan, type=StreamPlan), **fields)
    return structs.replace(offer, plan=msgspec.Raw(msgspec.json.encode(plan)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"names": ["a", "a"]}, "a name comes twice"),
        ({"names": ["a"]}, "differ in number"),
        ({"dtypes": ["float99", "int8"]}, "unknown dtype 'float99'"),
        ({"shapes": [(-1,), (3,)]}, "impossible shape"),
        ({"shapes": [(1 << 61,), (3,)]}, "impossible shape"),
        ({"aliases": {"c": "d"}}, "alias c of d"),
        ({"aliases": {"a": "b"}}, "alias a of b"),
        ({"chunks": ChunkColumns([0, 2], [0, 0], [8, 3])}, "not listed"),
        ({"chunks": ChunkColumns([0, 1], [0], [8, 3])}, "do not fit their tensors' dimensions"),
        ({"chunks": ChunkColumns([0, 1], [4, 0], [8, 3])}, "leaves its shape"),
        ({"chunks": ChunkColumns([1, 0], [0, 0], [3, 8])}, "begins within an element"),
        ({"blocks": [34]}, "blocks of 34 bytes for a stream of 35"),
        ({"blocks": [36, -1]}, "of a size out of range"),
        ({"blocks": [3, 32]}, "a block begins within an element of a"),
    ],
)
def test_offers_that_contradict_themselves(fields: dict[str, Any], said: str) -> None:
    offer = offer_of({"a": torch.zeros(8), "b": torch.zeros(3, dtype=torch.int8)})
    LayoutCache().read(changed(offer))
    with pytest.raises(CorruptCheckpoint, match=said):
        LayoutCache().read(changed(offer, **fields))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.data())
def test_damaged_plans_are_refused_or_read(data: st.DataObject) -> None:
    """Never anything else than an error of ours."""
    offer = offer_of({"a": torch.zeros(8), "b": {"c": torch.zeros(2, 3), "n": [1]}})
    content = bytearray(offer.plan)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.sampled_from(b'0123456789-"[]{},:a'))
    with suppress(AsyncDCPError):
        LayoutCache().read(structs.replace(offer, plan=msgspec.Raw(bytes(content))))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["float64", "float32", "int8"]), st.integers(0, 3000)), max_size=12))
def test_blocks_tile_the_stream(sizes: list[tuple[str, int]]) -> None:
    state = {str(n): torch.empty(size, dtype=getattr(torch, dtype)) for n, (dtype, size) in enumerate(sizes)}
    stream = plan_stream(describe(flatten(state)).structure, 4096)
    end = 0
    for block in stream.blocks:
        assert block.begin == end
        assert 0 < block.length <= 4096
        assert sum(piece.length for piece in block.pieces) == block.length
        end += block.length
    assert end == sum(tensor.nbytes for tensor in state.values())
    assert LayoutCache().read(offer_of(state)).layout.total == end
    assert len(stream.batches) == -(-len(stream.blocks) // wire.BATCH_BLOCKS)
