"""One load: the plan's items become ranges with buffers, and the reader fills them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from asyncdcp.boxes import Box
from asyncdcp.pipeline.formats import ReadableCheckpoint
from asyncdcp.pipeline.reader import ReadRange
from asyncdcp.planning.load_plan import LoadPlan
from asyncdcp.trace import Trace


class Target(Protocol):
    """Where the bytes of one ``Want`` go. ``deliver`` is called on worker threads, several at once for disjoint
    elements.
    """

    @property
    def buffer(self) -> memoryview | None:
        """The want's whole box as packed row-major bytes, if its memory can be written to directly."""
        ...

    def deliver(self, chunk: Box, start: int, data: memoryview) -> None:
        """Takes bytes of the stored ``chunk``, whole elements from its byte ``start`` on; what lies outside the want is
        ignored.
        """
        ...


async def load(reader: ReadableCheckpoint, plan: LoadPlan, targets: Sequence[Target], trace: Trace) -> None:
    """Fills ``targets`` (one for each of the plan's wants). Errors and guarantees are those of
    ``ReadableCheckpoint.read``.
    """
    ranges = []
    for item in plan.items:
        target = targets[item.want]
        buffer = target.buffer if item.target >= 0 else None
        if buffer is not None:
            into = buffer[item.target : item.target + item.end - item.begin]
            ranges.append(ReadRange(item.file, item.begin, item.end, into, None))
        else:
            deliver = partial(_deliver, target, item.chunk, item.start)
            ranges.append(ReadRange(item.file, item.begin, item.end, None, deliver))
    await reader.read(ranges, trace)


def _deliver(target: Target, chunk: Box, start: int, offset: int, data: memoryview) -> None:
    target.deliver(chunk, start + offset, data)
