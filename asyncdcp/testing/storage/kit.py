"""How checks come by storages, what they fill them with, and how they tell what was refused."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias

from asyncdcp.storage import ObjectReader, ObjectWriter, Storage

_PIECE: Final = 64 << 10


@dataclass(frozen=True)
class StorageKit:
    """How the checks come by storages. ``make`` gives one of a new, empty place each time.

    ``again`` gives another instance of the same place, as another process would have it; by default the same one, for
    storages that have only one.
    """

    make: Callable[[], Storage]
    again: Callable[[Storage], Storage] = lambda storage: storage


Check: TypeAlias = Callable[[StorageKit], Awaitable[None]]


def page_buffer(data: bytes) -> memoryview:
    """A writable buffer on a page boundary that holds ``data``."""
    view = memoryview(mmap.mmap(-1, max(1, len(data))))
    view[: len(data)] = data
    return view[: len(data)]


@contextmanager
def raises(kind: type[BaseException], match: str = "") -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert match in str(error), f"{match!r} is not in {error!r}"
    else:
        raise AssertionError(f"{kind.__name__} was not raised")


async def write(writer: ObjectWriter, data: bytes, step: int = _PIECE) -> None:
    """Writes all pieces at once, the last one padded, last first."""
    alignment = writer.alignment
    async with asyncio.TaskGroup() as group:
        for offset in reversed(range(0, len(data), step)):
            piece = data[offset : offset + step]
            padded = piece.ljust(-(-len(piece) // alignment) * alignment, b"#")
            group.create_task(writer.write(offset, page_buffer(padded)))
    await writer.finish(len(data))


async def stored(storage: Storage, name: str, data: bytes, hint: int = 0) -> None:
    await write(await storage.create(name, hint), data)


async def opened(storage: Storage, length: int) -> tuple[bytes, ObjectReader]:
    data = os.urandom(length)
    await stored(storage, "a", data)
    return data, await storage.open("a")
