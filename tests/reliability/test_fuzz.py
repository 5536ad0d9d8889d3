"""Nothing that a file or a message can say does harm."""

from __future__ import annotations

from contextlib import suppress

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from asyncdcp.envelope import _seal, decode_index, decode_record
from asyncdcp.errors import CorruptCheckpoint
from asyncdcp.worker.protocol import Framer, ProtocolError, ToTrainer, ToWorker
from tests.pipeline.forge import steady
from tests.reliability.fuzz import checkpoints, frames
from tests.reliability.power import Figures

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


def test_forged_checkpoints() -> None:
    figures = Figures()
    checkpoints(200, 1, figures)
    assert figures["CorruptCheckpoint"] > 80


def test_frames() -> None:
    figures = Figures()
    frames(2000, 1, figures)
    assert figures["refused"] > 1000


@steady
@given(st.binary())
def test_any_bytes(data: bytes) -> None:
    for sealed in (data, _seal("record", data), _seal("index", data)):
        for decode in (decode_record, decode_index):
            try:
                decode(sealed, "name")
            except CorruptCheckpoint:
                pass
            else:
                raise AssertionError("bytes by chance are no Record and no Index")
    for direction in (ToWorker, ToTrainer):
        framer: Framer[object] = Framer(direction)
        with suppress(ProtocolError):
            assert not list(framer.feed(data))


@steady
@given(JSON)
def test_any_json(value: object) -> None:
    body = msgspec.json.encode(value)
    for kind, decode in (("record", decode_record), ("index", decode_index)):
        try:
            decode(_seal(kind, body), "name")
        except CorruptCheckpoint:
            continue
        raise AssertionError("JSON by chance is no Record and no Index")
