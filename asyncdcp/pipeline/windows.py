"""Windows: how the ranges that somebody wants of data files are cut into reads, and where what was read goes.

A window is a run of whole blocks of a file, at most a slab. Blocks of a transformed file, stored in other lengths, are
verified first, then decoded, one at a time. No I/O is done here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

import msgspec
import xxhash

from asyncdcp.errors import ChecksumMismatch, CorruptCheckpoint
from asyncdcp.extensions import BlockContext, Chain
from asyncdcp.format.blocks import SLAB_BYTES, checksum, element_size, stored_limit
from asyncdcp.pipeline.union import FileMap, enumerated
from asyncdcp.storage.files import address

ALIGNMENT_LIMIT = 64 << 10
"""A storage that wants more than this is read unaligned."""
STRAIGHT_BYTES = 64 << 10
"""Pieces at least this long are read straight to their target where the page cache has them; shorter ones are copied.
"""
Deliver = Callable[[int, memoryview], None]


class Span(NamedTuple):
    """Where the blocks ``first <= i < last`` are stored: ``length`` bytes read from ``start`` on are aligned and have
    them all, from their byte ``skip`` on.
    """

    first: int
    last: int
    start: int
    length: int
    skip: int


def span_of(file: FileMap, begin: int, end: int, alignment: int) -> Span:
    """The span of the blocks that hold the bytes ``begin <= i < end`` of the image."""
    first, last = begin // file.block_bytes, -(-end // file.block_bytes)
    step = alignment if alignment <= ALIGNMENT_LIMIT else 1
    start = file.bounds[first] // step * step
    length = -(-(file.bounds[last] - start) // step) * step
    return Span(first, last, start, length, file.bounds[first] - start)


def decoded_blocks(
    file: FileMap, chain: Chain, save_id: str, span: Span, data: memoryview
) -> Iterator[tuple[int, memoryview]]:
    """Each block of the span and where it begins in the image. ``ChecksumMismatch``, or ``CorruptCheckpoint`` for one
    that is as it was stored and still cannot be decoded.
    """
    assert file.checksums is not None
    base = file.bounds[span.first] - span.skip
    limit = stored_limit(file.block_bytes)
    for block in range(span.first, span.last):
        stored = data[file.bounds[block] - base : file.bounds[block + 1] - base]
        if checksum(stored) != file.checksums[block]:
            raise mismatch(file, block)
        begin = block * file.block_bytes
        end = min(begin + file.block_bytes, file.size)
        size = element_size(file.elements, begin, end)
        context = BlockContext(save_id, file.name, block, len(file.checksums), size, limit)
        try:
            yield begin, chain.decode(stored, context, end - begin)
        except CorruptCheckpoint as error:
            error.tensors = file.tensors_in(block)
            raise


def mismatch(file: FileMap, block: int) -> ChecksumMismatch:
    """The error of a block that does not match its checksum."""
    begin, tensors = block * file.block_bytes, file.tensors_in(block)
    return ChecksumMismatch(
        f"{file.name}: block {block} (bytes {begin} to {min(begin + file.block_bytes, file.size)}) does not match its "
        f"checksum; it holds {enumerated(tensors)}. Tensors loaded in place may be partly written",
        path=file.name,
        block=block,
        tensors=tensors,
    )


class ReadRange(msgspec.Struct, frozen=True, gc=False):
    """Bytes ``begin <= i < end`` of decoded data file ``file``, and what becomes of them.

    Either ``into`` is a writable memoryview of ``end - begin`` bytes, or ``deliver(offset, data)`` is called, on a
    worker thread, with verified pieces of the range in any order; ``data`` is only good during the call.
    """

    file: str
    begin: int
    end: int
    into: memoryview | None
    deliver: Deliver | None


class Part(msgspec.Struct, frozen=True, gc=False):
    """The part of a range that lies in a window; ``offset`` is where it begins in its range."""

    begin: int
    end: int
    offset: int
    range: ReadRange


class Window(NamedTuple):
    """A run of whole blocks of a file, ``begin <= i < end``, and the parts wanted of it, in order."""

    file: FileMap
    begin: int
    end: int
    parts: list[Part]

    @property
    def wanted(self) -> int:
        """The bytes of its parts: less than it has, or more where they overlap."""
        return sum(part.end - part.begin for part in self.parts)


def cut_windows(ranges: Sequence[ReadRange], files: Mapping[str, FileMap], gap: int = 0) -> list[Window]:
    """Cuts the ranges along a grid of slabs. In each slab, every run of blocks that something wants is a window.

    Runs no more than ``gap`` bytes apart are one, as long as no more is unwanted in it than wanted.
    """
    slabs: dict[tuple[str, int], list[Part]] = {}
    for wanted in sorted(ranges, key=lambda part: (part.file, part.begin)):
        block = files[wanted.file].block_bytes
        step = SLAB_BYTES // block * block
        for begin in range(wanted.begin // step * step, wanted.end, step):
            part = Part(max(begin, wanted.begin), min(begin + step, wanted.end), max(begin - wanted.begin, 0), wanted)
            slabs.setdefault((wanted.file, begin), []).append(part)
    return [
        window
        for (name, _), parts in sorted(slabs.items(), key=itemgetter(0))
        for window in _runs(files[name], parts, gap)
    ]


def _runs(file: FileMap, parts: list[Part], gap: int) -> Iterator[Window]:
    """The windows of one slab, whose parts are given in order of where they begin."""
    block, run = file.block_bytes, list[Part]()
    begin = end = unwanted = 0
    for part in parts:
        first = part.begin // block * block
        apart = max(0, first - end)
        if run and apart and (apart > gap or 2 * (unwanted + apart) > end - begin + apart):
            yield Window(file, begin, end, run)
            run = []
        if not run:
            begin, end, unwanted, apart = first, first, 0, 0
        run.append(part)
        unwanted += apart
        end = max(end, min(-(-part.end // block) * block, file.size))
    if run:
        yield Window(file, begin, end, run)


def straight_parts(window: Window) -> list[Part]:
    """The parts that are long, go to memory, and share no byte with another part."""
    chosen: list[Part] = []
    reach = window.begin
    for part, following in zip(window.parts, [*window.parts[1:], None], strict=True):
        alone = part.begin >= reach and (following is None or following.begin >= part.end)
        if alone and part.range.into is not None and part.end - part.begin >= STRAIGHT_BYTES:
            chosen.append(part)
        reach = max(reach, part.end)
    return chosen


def layout_of(window: Window, straight: list[Part], bounce: memoryview) -> list[memoryview]:
    """Buffers that take the whole window: the straight parts' targets, and ``bounce`` for everything between them."""
    buffers: list[memoryview] = []
    position = window.begin
    for part in straight:
        assert part.range.into is not None
        if part.begin > position:
            buffers.append(bounce[position - window.begin : part.begin - window.begin])
        buffers.append(part.range.into[part.offset : part.offset + part.end - part.begin])
        position = part.end
    if position < window.end:
        buffers.append(bounce[position - window.begin : window.end - window.begin])
    return buffers


def place_window(window: Window, straight: list[Part], bounce: memoryview) -> None:
    """Copies to their targets the parts of a verified window that are not there yet, and delivers the rest."""
    there = set(map(id, straight))
    for part in window.parts:
        into = part.range.into
        data = bounce[part.begin - window.begin : part.end - window.begin]
        if into is None:
            assert part.range.deliver is not None
            part.range.deliver(part.offset, data)
        elif id(part) not in there:
            copy_bytes(into[part.offset : part.offset + len(data)], data)


class WindowCheck:
    """Holds a window's blocks against their checksums, as its bytes arrive in the buffers of ``layout``."""

    def __init__(self, window: Window, layout: list[memoryview]) -> None:
        self._window = window
        self._layout = layout
        self._pieces = iter(layout)
        self._piece = memoryview(b"")
        self._begin = window.begin

    def advance(self, there: int) -> None:
        """The window's first ``there`` bytes have arrived: checks the blocks that are whole."""
        file = self._window.file
        while file.checksums is not None and self._begin < self._window.end:
            end = min(self._begin + file.block_bytes, self._window.end)
            if end > self._window.begin + there:
                return
            block = self._begin // file.block_bytes
            if self._digest(end - self._begin) != file.checksums[block]:
                raise mismatch(file, block)
            self._begin = end

    def finish(self) -> None:
        """All is there."""
        file, window = self._window.file, self._window
        self.advance(window.end - window.begin)
        if file.checksums is None and file.check is not None:
            file.check(window.begin, window.end, self._layout)

    def _digest(self, missing: int) -> int:
        hasher = xxhash.xxh3_64()
        while missing:
            if not len(self._piece):
                self._piece = next(self._pieces)
            taken = min(missing, len(self._piece))
            hasher.update(self._piece[:taken])
            self._piece = self._piece[taken:]
            missing -= taken
        return hasher.intdigest()


def place_block(parts: list[Part], begin: int, block: memoryview) -> None:
    """Copies or delivers what is wanted of one decoded block."""
    for part in parts:
        first, last = max(part.begin, begin), min(part.end, begin + len(block))
        if first >= last:
            continue
        data, offset = block[first - begin : last - begin], part.offset + first - part.begin
        if part.range.into is not None:
            copy_bytes(part.range.into[offset : offset + len(data)], data)
        else:
            assert part.range.deliver is not None
            part.range.deliver(offset, data)


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Long copies by memmove, which releases the GIL; a memoryview's slice assignment holds it, and costs less for
    short ones.
    """
    if len(target) < STRAIGHT_BYTES:
        target[:] = source
    else:
        ctypes.memmove(address(target), address(source), len(target))
