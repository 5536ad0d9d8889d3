"""A checkpoint copied as it is stored, byte for byte, from one place to another: by its files, then by its Record.

The copy is committed by the same Record, so it is the same checkpoint: same save id, term, parent, digests. What is
copied is not decoded; whoever loads the copy verifies it as he would the original.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Final

import anyio

from asyncdcp.errors import StorageError
from asyncdcp.metadata import RECORD_LIMIT
from asyncdcp.names import belongs_to, record_name
from asyncdcp.runs.layout import line_term_of, term_of
from asyncdcp.runs.listing import Checkpoint, Run
from asyncdcp.storage import ObjectReader, ObjectWriter, Place, Storage
from asyncdcp.storage.files import io_buffer
from asyncdcp.unwinding import ungrouped

_WINDOW: Final = 8 << 20
_COPIES_IN_FLIGHT: Final = 4
_LINE_LIMIT: Final = 16 << 20


async def copy_checkpoint(source: Storage, target: Storage, save_id: str) -> bool:
    """Copies a commit; False if the target has it already. ``FileNotFoundError`` if it is deleted meanwhile.

    Whatever an earlier try left of it is begun anew. At no time is there a Record over files that are not whole.
    """
    own = record_name(save_id)
    there = await target.list()
    if own in there:
        return False
    record = await source.get(own, RECORD_LIMIT)
    await target.delete([name for name in there if belongs_to(name, save_id)])
    for name, size in (await source.list()).items():
        if belongs_to(name, save_id) and name != own:
            await _copy_object(source, target, name, size)
    await target.barrier()
    if await source.get(own, RECORD_LIMIT) != record:  # it was whole all the time: deleting begins with the Record
        raise StorageError(f"{source.info.location} has changed while it was copied", path=source.info.location)
    return await target.claim(own, record)


async def copy_lines(source: Place, run: Run, target: Place, there: Run) -> None:
    """Copies the run's terms and lines, by which its checkpoints count, as far as the target lacks them; oldest first.

    ``run`` and ``there`` are the two as they were looked at just now.
    """
    own = run.survey.own.objects
    terms = sorted((number, name) for name in own if (number := term_of(name)) is not None)
    lines = sorted((number, name) for name in own if (number := line_term_of(name)) is not None)
    for _, name in (*terms, *lines):
        if name not in there.survey.own.objects:
            data = await source.storage.get(name, _LINE_LIMIT)
            with suppress(FileExistsError):
                await target.storage.put(name, data)
    await target.storage.barrier()


def missing(run: Run, there: Run) -> list[Checkpoint]:
    """The good checkpoints of ``run`` that ``there`` has not committed, newest first: that is the one to lose least."""
    have = {checkpoint.save_id for checkpoint in there.checkpoints if checkpoint.state == "committed"}
    return [checkpoint for checkpoint in reversed(run.good()) if checkpoint.save_id not in have]


async def _copy_object(source: Storage, target: Storage, name: str, size: int) -> None:
    reader = await source.open(name)
    try:
        writer = await target.create(name, size)
        try:
            await _copy_windows(reader, writer, size)
            await writer.finish(size)
        except BaseException:
            with anyio.CancelScope(shield=True), suppress(StorageError):
                await writer.abort()
            raise
    finally:
        with anyio.CancelScope(shield=True), suppress(StorageError):
            await reader.aclose()


async def _copy_windows(reader: ObjectReader, writer: ObjectWriter, size: int) -> None:
    if reader.size != size:
        raise StorageError(f"an object of {size} bytes has {reader.size} now")
    offsets = iter(range(0, size, _WINDOW))

    async def work(offsets: Iterator[int]) -> None:
        window = io_buffer(_WINDOW)
        for offset in offsets:
            length = min(_WINDOW, size - offset)
            into = window[: -(-length // reader.alignment) * reader.alignment]
            await reader.read(offset, [into])
            padded = min(-(-length // writer.alignment) * writer.alignment, _WINDOW)
            window[length:padded] = bytes(padded - length)
            await writer.write(offset, window[:padded])

    with ungrouped():
        async with anyio.create_task_group() as tasks:
            for _ in range(min(_COPIES_IN_FLIGHT, -(-size // _WINDOW))):
                tasks.start_soon(work, offsets)
