"""From the stored blocks of a transformed data file back to its image: verified first, then decoded, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from asyncdcp.errors import ChecksumMismatch, CorruptCheckpoint
from asyncdcp.extensions import BlockContext, Chain
from asyncdcp.format.blocks import checksum, element_size, stored_limit
from asyncdcp.pipeline.union import FileMap, enumerated

ALIGNMENT_LIMIT = 64 << 10
"""A storage that wants more than this is read unaligned."""


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
