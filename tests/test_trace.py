from __future__ import annotations

import pytest

from asyncdcp.trace import Span, Trace


def test_stages_are_summed_from_first_start_to_last_end() -> None:
    trace = Trace()
    for span in (Span("a", 1.0, 2.0, 10), Span("b", 0.0, 0.5), Span("a", 1.5, 4.0, 5)):
        trace.add(span)
    assert trace.seconds() == {"a": 3.0, "b": 0.5}
    assert trace.bytes() == {"a": 15, "b": 0}


def test_a_span_is_heard_of_also_when_the_block_raises() -> None:
    heard: list[tuple[str, int, int]] = []
    trace = Trace(lambda span, total: heard.append((span.stage, span.bytes, total)))
    trace.total = 7
    with pytest.raises(KeyError), trace.span("x", 3):
        raise KeyError
    assert heard == [("x", 3, 7)]
