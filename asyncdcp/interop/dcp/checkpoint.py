"""A DCP checkpoint opened as it is, by ``AsyncCheckpointer.load`` and whatever else opens places."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

import anyio
from anyio import to_thread
from msgspec.structs import replace

from asyncdcp.errors import CorruptCheckpoint, InvalidOption
from asyncdcp.interop.dcp.catalog import Catalog, Described, describe
from asyncdcp.interop.dcp.entries import (
    EDGE_BYTES,
    Chunk,
    Edges,
    Entry,
    NotPlain,
    Place,
    decode_tensor,
    decode_value,
    locate,
)
from asyncdcp.interop.dcp.metadata_file import load_metadata
from asyncdcp.interop.dcp.pieces import Record, RecordCheck, WholeElements
from asyncdcp.metadata import INDEX_LIMIT, Metadata
from asyncdcp.pipeline.formats import ForeignPlace
from asyncdcp.pipeline.reader import READS_IN_FLIGHT, RangeReader
from asyncdcp.pipeline.union import FileMap
from asyncdcp.pipeline.windows import ReadRange
from asyncdcp.storage.port import ObjectReader, Storage
from asyncdcp.trace import Trace
from asyncdcp.unwinding import ungrouped

T = TypeVar("T")

_OWN_METADATA = re.compile(r"__(\d+)\.metadata")
_SMALL = 16 * EDGE_BYTES
"""Entries up to this long are read and decoded whole: one read instead of three."""
_PAGE = 4096


async def open_dcp(place: ForeignPlace) -> DcpCheckpoint | None:
    """The DCP checkpoint of a directory, None if it is none. All metadata is checked, and the plain values are read."""
    if place.name is not None:
        return None
    storage, location = place.storage, place.storage.info.location
    found = await _metadata(storage)
    if not found:
        return None
    sizes = await storage.list()
    catalog = Catalog(location, sizes)
    for name, data in found.items():
        catalog.add(await to_thread.run_sync(load_metadata, data, f"{location}/{name}"))
    values: dict[str, Any] = {}

    async def take(entry: Entry, source: ObjectReader) -> None:
        data = await read_entry(source, entry.offset, entry.length)
        values[entry.name] = await to_thread.run_sync(_value, entry, data)

    await for_each(storage, catalog.values.values(), lambda entry: entry, take)
    ordered = {name: values[name] for name in catalog.values}
    return DcpCheckpoint(storage, sizes, await to_thread.run_sync(describe, catalog, ordered))


async def _metadata(storage: Storage) -> dict[str, bytes]:
    """The metadata file, or those of all ranks, in their order, where they were not coordinated."""
    try:
        return {".metadata": await storage.get(".metadata", INDEX_LIMIT)}
    except InvalidOption:
        return {}  # a storage that cannot hold such a name
    except FileNotFoundError:
        ranks = {int(match[1]): name for name in await storage.list() if (match := _OWN_METADATA.fullmatch(name))}
        return {ranks[rank]: await storage.get(ranks[rank], INDEX_LIMIT) for rank in sorted(ranks)}


class DcpCheckpoint:
    """A ``ReadableCheckpoint`` over the files of DCP."""

    def __init__(self, storage: Storage, sizes: Mapping[str, int], described: Described, registry: Any = None) -> None:
        self._storage = storage
        self._sizes = sizes
        self._described = described
        self._registry = registry

    @property
    def metadata(self) -> Metadata:
        return self._described.metadata

    async def aclose(self) -> None:
        """Nothing is open between reads."""

    async def read(self, ranges: Sequence[ReadRange], trace: Trace) -> None:
        """Reads packed chunks from their places, and decodes the others whole.

        Records of the archives that have a CRC are verified where they are read whole.
        """
        wanted: dict[str, list[ReadRange]] = defaultdict(list)
        for part in ranges:
            wanted[part.file].append(part)
        for key in wanted.keys() & self._described.held.keys():
            await to_thread.run_sync(_place, wanted.pop(key), self._described.held[key])
        plain: list[ReadRange] = []
        records: dict[str, list[Record]] = defaultdict(list)

        async def take(item: tuple[Entry, Chunk], source: ObjectReader) -> None:
            entry, chunk = item
            parts = wanted[f"{entry.path}:{entry.offset}"]
            found = await _locate(entry, chunk, source)
            if found is not None:
                plain.extend(_moved(part, entry.path, found.begin, chunk.dtype.itemsize) for part in parts)
                if found.crc is not None:
                    records[entry.path].append(Record(*found.record, found.crc, entry.name))
                return
            with trace.span("read", entry.length):
                data = await read_entry(source, entry.offset, entry.length)
            await to_thread.run_sync(lambda: _place(parts, decode_tensor(entry, chunk, data, self._registry)))

        await for_each(self._storage, (self._described.entries[key] for key in wanted), lambda item: item[0], take)
        async with RangeReader(self._storage, self._maps(plain, records)) as reader:
            await reader.read(plain, trace)

    def _maps(self, ranges: Iterable[ReadRange], records: dict[str, list[Record]]) -> dict[str, FileMap]:
        paths = {part.file for part in ranges}
        inside: dict[str, list[tuple[int, str]]] = {path: [] for path in paths}
        for entry, _ in self._described.entries.values():
            if entry.path in paths:
                inside[entry.path].append((entry.offset, entry.name))
        maps = {}
        for path, members in inside.items():
            members.sort()
            begins, names = [begin for begin, _ in members], [name for _, name in members]
            check = RecordCheck(path, records[path])
            maps[path] = FileMap(path, self._sizes[path], _PAGE, None, begins, names, check)
        return maps


async def for_each(
    storage: Storage,
    items: Iterable[T],
    entry_of: Callable[[T], Entry],
    take: Callable[[T, ObjectReader], Awaitable[None]],
) -> None:
    """Calls ``take`` with every item and its open file, several at once, in the order in which they lie."""
    ordered = sorted(items, key=lambda item: entry_of(item)[1:3])
    for path, group in groupby(ordered, key=lambda item: entry_of(item).path):
        try:
            source = await storage.open(path)
        except FileNotFoundError as error:
            raise CorruptCheckpoint(f"the file {path} of {storage.info.location} is missing", path=path) from error

        async def work(waiting: Iterator[T] = iter(list(group)), source: ObjectReader = source) -> None:  # noqa: B008
            for item in waiting:
                await take(item, source)

        try:
            with ungrouped():
                async with anyio.create_task_group() as workers:
                    for _ in range(READS_IN_FLIGHT):
                        workers.start_soon(work)
        finally:
            with anyio.CancelScope(shield=True):
                await source.aclose()


async def _locate(entry: Entry, chunk: Chunk, source: ObjectReader) -> Place | None:
    if entry.transforms or entry.length <= _SMALL:
        return None
    head = await read_entry(source, entry.offset, EDGE_BYTES)
    tail = await read_entry(source, entry.offset + entry.length - EDGE_BYTES, EDGE_BYTES)
    return await to_thread.run_sync(locate, entry, chunk, Edges(entry.length, head, tail))


async def read_entry(source: ObjectReader, offset: int, length: int) -> bytearray:
    data = bytearray(length)
    try:
        count = await source.read(offset, [memoryview(data)])
    except EOFError:
        count = 0
    if count != length:
        raise CorruptCheckpoint(f"a file of the checkpoint has become shorter than {offset + length} bytes")
    return data


def _moved(part: ReadRange, path: str, begin: int, itemsize: int) -> ReadRange:
    deliver = part.deliver
    if deliver is not None and begin % itemsize:
        deliver = WholeElements(deliver, itemsize)
    return replace(part, file=path, begin=part.begin + begin, end=part.end + begin, deliver=deliver)


def _place(parts: Iterable[ReadRange], data: bytes | memoryview) -> None:
    view = memoryview(data)
    for part in parts:
        piece = view[part.begin : part.end]
        if part.into is not None:
            part.into[:] = piece
        else:
            assert part.deliver is not None
            part.deliver(0, piece)


def _value(entry: Entry, data: bytes | bytearray) -> Any:
    try:
        return decode_value(entry, data)
    except NotPlain:
        return _Unread(data, entry.transforms)


class _Unread:
    """A value that would take running the checkpoint's code. Pickled it stands for itself, which a load refuses unless
    it is given ``allow_pickle``.
    """

    def __init__(self, data: bytes | bytearray, transforms: tuple[str, ...]) -> None:
        self._state = (bytes(data), transforms)

    def __reduce__(self) -> Any:
        return load_trusted, self._state


def load_trusted(data: bytes | bytearray, transforms: tuple[str, ...]) -> Any:
    """What ``torch.load`` makes of an entry, running the checkpoint's code: for unpickling by ``allow_pickle`` only."""
    import io

    import torch

    from asyncdcp.interop.dcp.entries import VALUE_LIMIT, undo

    plain = undo(Entry("a value", "its entry", 0, len(data), transforms), data, VALUE_LIMIT)
    return torch.load(io.BytesIO(plain), map_location="cpu", weights_only=False)
