"""A lane that ends while a batch is given to it; what its endpoint leaves behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch

from asyncdcp.state_dict.flatten import flatten
from asyncdcp.state_dict.structure import describe
from asyncdcp.trace import Trace
from asyncdcp.transport import MemoryHub
from asyncdcp.transport.blocks import Batch
from asyncdcp.transport.endpoint import Endpoint
from asyncdcp.transport.lane import Flow, Lane, Staged
from asyncdcp.transport.stream import plan_stream
from asyncdcp.transport.wire import Tick, Verdict


class Late(Flow):
    """Before the first change is made, its lane ends: as on another thread."""

    end: Callable[[], object] | None = None

    def change(self, change: Callable[[], object]) -> None:
        if self.end is not None:
            end, self.end = self.end, None
            super().change(end)
        super().change(change)


def test_a_batch_that_comes_as_the_lane_ends_is_not_kept() -> None:
    stream = plan_stream(describe(flatten({"w": torch.ones(3)})).structure, 4096)
    batch: Any = Staged(Batch(1, [torch.ones(12, dtype=torch.uint8)], ()), Tick(3, Verdict.GO))
    flow = Late(stream, Trace())
    lane = Lane(flow, Endpoint(MemoryHub(2).link(0), 1, 1.0, sender=True))
    lane.give(batch)
    assert list(lane._given) == [batch]
    flow.end = lane._close
    lane.give(batch)
    assert not lane._given


async def test_a_long_call_leaves_nothing_that_only_the_garbage_collector_would_find() -> None:
    end = Endpoint(MemoryHub(2).link(0), 1, 1.0, sender=True)
    gone = weakref.ref(end)
    gc.collect()
    gc.disable()
    try:
        await end.call_long(int)
        del end
        assert gone() is None
    finally:
        gc.enable()
