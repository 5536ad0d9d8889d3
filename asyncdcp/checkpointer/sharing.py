"""Reading for each other: of what several ranks want each part is read by one of them, verified, and sent to the rest.

Every message ends with a digest of what it carries, so that no byte is taken over that was not verified here, too.

All ranks go through the units in one order, so none can wait for another in a circle: of all that is not done, whoever
is to send the first unit has nothing before it to read or send, and whoever is to get it has nothing before it to
receive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

import anyio
import xxhash
from anyio import to_thread

from asyncdcp.errors import PeerFailed
from asyncdcp.metadata import DTYPE_SIZES, Metadata, TensorStorageMetadata
from asyncdcp.pipeline.formats import ReadableCheckpoint
from asyncdcp.pipeline.load import Target, place
from asyncdcp.pipeline.windows import ReadRange
from asyncdcp.planning.load_plan import LoadPlan, ReadItem
from asyncdcp.planning.shared_reads import SharedReads, Unit, Wanted, cut
from asyncdcp.ranks import Links
from asyncdcp.trace import Trace
from asyncdcp.unwinding import frameless, ungrouped

RECEIVERS: Final = 4
SENDERS: Final = 2
BATCH_UNITS: Final = 2
"""With units of a slab (8 MiB) at most, a rank needs RECEIVERS + SENDERS * BATCH_UNITS slabs for what is on its way."""
_DIGEST: Final = 8


def what_to_share(plan: LoadPlan, metadata: Metadata) -> Wanted:
    """What a rank might share of what it is to read: all whose elements lie whole in every part."""
    return Wanted.of([item for item in plan.items if _is_aligned(metadata, plan, item)])


def _is_aligned(metadata: Metadata, plan: LoadPlan, item: ReadItem) -> bool:
    tensor = metadata.state_dict_metadata[plan.wants[item.want].name]
    assert isinstance(tensor, TensorStorageMetadata)
    return item.begin % DTYPE_SIZES[tensor.properties.dtype] == 0


class Exchange:
    """This rank's part in the shared reads of a load. ``rest`` is what it reads for itself alone; ``read_bytes`` and
    ``received_bytes`` are of what it shares.
    """

    def __init__(self, shared: SharedReads, rank: int, plan: LoadPlan, targets: Sequence[Target]) -> None:
        self._shared = shared
        self._rank = rank
        self._targets = targets
        self._room = max([unit.nbytes for unit in shared.units], default=0) + _DIGEST
        self._places: dict[tuple[str, int, int], list[ReadItem]] = {}
        self._reading = anyio.Lock()
        mine = [(number, unit) for number, unit in enumerate(shared.units) if rank in shared.groups[unit.group]]
        self._sends = [(number, unit) for number, unit in mine if unit.reader == rank]
        self._receives = [(number, unit) for number, unit in mine if unit.reader != rank]
        self.read_bytes = sum(unit.nbytes for _, unit in self._sends)
        self.received_bytes = sum(unit.nbytes for _, unit in self._receives)
        self.rest = self._find_places(plan, [unit for _, unit in mine]) if mine else plan

    def _find_places(self, plan: LoadPlan, units: Sequence[Unit]) -> LoadPlan:
        pieces = {(self._shared.files[file], begin, end) for unit in units for file, begin, end in unit.pieces}
        rest = []
        for item in plan.items:
            parts = [
                (item.file, begin, end) for _, begin, end in cut((0, item.begin, item.end), self._shared.unit_bytes)
            ]
            if not pieces.issuperset(parts):
                rest.append(item)
                continue
            for part in parts:
                self._places.setdefault(part, []).append(item)
        return LoadPlan(plan.wants, tuple(rest), sum(item.end - item.begin for item in rest))

    async def run(self, reader: ReadableCheckpoint, links: Links, trace: Trace) -> None:
        """Reads, sends and receives until all targets have what is shared. Where that fails or is cancelled, the links
        are closed, so that the peers fail too, at once. On return and on raise no target is in use any more.
        """
        sends, receives = iter(_batches(self._sends)), iter(self._receives)
        try:
            with ungrouped():
                async with anyio.create_task_group() as tasks:
                    for _ in range(min(SENDERS, len(self._sends))):
                        tasks.start_soon(frameless, partial(self._send, sends, reader, links, trace))
                    for _ in range(min(RECEIVERS, len(self._receives))):
                        tasks.start_soon(frameless, partial(self._receive, receives, links, trace))
        except BaseException:
            await links.abort()
            raise

    # ── what this rank reads ──

    async def _send(
        self, batches: Iterator[list[tuple[int, Unit]]], reader: ReadableCheckpoint, links: Links, trace: Trace
    ) -> None:
        rooms = [memoryview(bytearray(self._room)) for _ in range(BATCH_UNITS)]
        for batch in batches:
            messages = [
                (number, unit, room[: unit.nbytes + _DIGEST])
                for (number, unit), room in zip(batch, rooms, strict=False)
            ]
            async with self._reading:
                await reader.read([span for _, unit, into in messages for span in self._ranges(unit, into)], trace)
            for _, unit, message in messages:
                await to_thread.run_sync(self._take, unit, message)
                await to_thread.run_sync(_seal, message)
            out = [(self._peers(unit), number, message) for number, unit, message in messages]
            with trace.span("send", sum(len(peers) * len(message) for peers, _, message in out)):
                await links.send(out)

    def _peers(self, unit: Unit) -> list[int]:
        return [rank for rank in self._shared.groups[unit.group] if rank != self._rank]

    def _ranges(self, unit: Unit, message: memoryview) -> Iterator[ReadRange]:
        position = 0
        for file, begin, end in unit.pieces:
            into = message[position : position + end - begin]
            yield ReadRange(self._shared.files[file], begin, end, into, None)
            position += end - begin

    # ── what others read for it ──

    async def _receive(self, units: Iterator[tuple[int, Unit]], links: Links, trace: Trace) -> None:
        room = memoryview(bytearray(self._room))
        for number, unit in units:
            message = room[: unit.nbytes + _DIGEST]
            with trace.span("receive", unit.nbytes):
                await links.receive(unit.reader, number, message)
            with trace.span("verify", unit.nbytes):
                await to_thread.run_sync(_check, message, unit.reader)
                await to_thread.run_sync(self._take, unit, message)

    def _take(self, unit: Unit, message: memoryview) -> None:
        """Puts a unit's bytes, which are verified, where this rank wants them."""
        position = 0
        for file, begin, end in unit.pieces:
            data = message[position : position + end - begin]
            for item in self._places[self._shared.files[file], begin, end]:
                place(item, self._targets[item.want], begin - item.begin, data)
            position += end - begin


def _batches(units: Sequence[tuple[int, Unit]]) -> Iterator[list[tuple[int, Unit]]]:
    for first in range(0, len(units), BATCH_UNITS):
        yield list(units[first : first + BATCH_UNITS])


def _seal(message: memoryview) -> None:
    message[-_DIGEST:] = xxhash.xxh3_64_digest(message[:-_DIGEST])


def _check(message: memoryview, sender: int) -> None:
    if xxhash.xxh3_64_digest(message[:-_DIGEST]) != bytes(message[-_DIGEST:]):
        raise PeerFailed(f"what rank {sender} has passed on came damaged over the network", rank=sender)
