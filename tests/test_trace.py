from __future__ import annotations

import json

import pytest

from asyncdcp.trace import Span, Trace, chrome_trace


def test_stages_are_summed_from_first_start_to_last_end() -> None:
    trace = Trace()
    for span in (Span("a", 1.0, 2.0, 10), Span("b", 0.0, 0.5), Span("a", 1.5, 4.0, 5)):
        trace.add(span)
    assert trace.seconds() == {"a": 3.0, "b": 0.5}


def test_a_span_is_heard_of_also_when_the_block_raises() -> None:
    heard: list[tuple[str, int, int]] = []
    trace = Trace(lambda span, total: heard.append((span.stage, span.bytes, total)))
    trace.total = 7
    with pytest.raises(KeyError), trace.span("x", 3):
        raise KeyError
    assert heard == [("x", 3, 7)]


def test_a_chrome_trace_has_every_span_and_no_overlap_in_a_track() -> None:
    spans = [
        Span("stage", 10.0, 11.0, 5),
        Span("write", 10.5, 12.0, 7),
        Span("write", 11.0, 11.5, 8),
        Span("write", 12.0, 13.0, 9),
    ]
    events = json.loads(chrome_trace(spans, "step 1"))["traceEvents"]
    whole = [event for event in events if event["ph"] == "X"]
    assert [(event["name"], event["ts"], event["dur"], event["args"]["bytes"]) for event in whole] == [
        ("stage", 0.0, 1e6, 5),
        ("write", 0.5e6, 1.5e6, 7),
        ("write", 1e6, 0.5e6, 8),
        ("write", 2e6, 1e6, 9),
    ]
    tracks = [event["tid"] for event in whole]
    assert tracks[1] != tracks[2] and tracks[1] == tracks[3] and tracks[0] not in tracks[1:]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {tracks[0]: "stage", tracks[1]: "write", tracks[2]: "write"}
    assert len(json.loads(chrome_trace([], "nothing"))["traceEvents"]) == 1
