"""The Storage port: the few operations on named objects that a checkpoint needs, and what each guarantees.

A Storage is one place that holds objects by flat names (no directories), such as the directory of one checkpoint.
What creating, syncing and linking mean for files stands in ``local.py``; an object store has its own. Every method
may be cancelled: it then raises only after what it had begun has come to rest, so a buffer is never read or written
later and nothing stays open.

Errors: an ``OSError`` of the system is raised as ``errors.StorageError`` (``StorageFull`` for ENOSPC and EDQUOT,
``StorageUnavailable`` where this process has no right, or has come to a limit of its own), with ``path`` and ``errno``;
a missing object as ``FileNotFoundError``; a bad name or a misaligned write as ``InvalidOption``.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, TypeAlias

from asyncdcp.errors import Closed, CorruptCheckpoint, InvalidOption, StorageError, UsageError

Buffer: TypeAlias = memoryview
"""A C-contiguous memoryview of format ``B``; writable where it is read into."""


NAME_LIMIT: Final = 200
"""Longest name of an object, which leaves a filesystem's 255 bytes room for the names of temporaries."""

NAME_PATTERN: Final = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
_NAME: Final = re.compile(NAME_PATTERN)
TEMPORARY: Final = re.compile(rf"\.({NAME_PATTERN})\.[0-9a-f]{{16}}")
"""A temporary's name; the group is the name that it is to get."""


def check_name(name: str) -> str:
    """The name itself, if it may name an object.

    Else raises ``InvalidOption``. Every Storage calls it for every name given.
    """
    if len(name) > NAME_LIMIT or not _NAME.fullmatch(name):
        raise InvalidOption(
            f"not an object's name: {name!r}; it takes 1 to {NAME_LIMIT} of [A-Za-z0-9._-], the first no dot"
        )
    return name


def check_removable(name: str) -> str:
    """The name itself, if it may name an object or a temporary: what ``Storage.delete`` takes."""
    return name if TEMPORARY.fullmatch(name) else check_name(name)


def check_length(path: str, size: int, limit: int) -> None:
    """``CorruptCheckpoint`` for a small object that is longer than it may be."""
    if size > limit:
        raise CorruptCheckpoint(f"{path} has {size} bytes, more than the {limit} that it may have", path=path)


def already_there(path: str) -> FileExistsError:
    """The error of ``create`` and ``put`` for a name that is taken."""
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)


def check_use(path: str, what: str, value: int, *, is_open: bool) -> None:
    """``Closed`` where a reader or writer is, ``InvalidOption`` for an offset or length that is negative."""
    if not is_open:
        raise Closed(f"{path} is closed", path=path)
    if value < 0:
        raise InvalidOption(f"{what} is {value}; it takes 0 or more", path=path)


def check_finish(path: str, length: int, writing: int, failed: str) -> None:
    """Whether an object may be finished: at no negative ``length``, with no writes under way, and none that failed."""
    if length < 0:
        raise InvalidOption(f"length is {length}; it takes 0 or more", path=path)
    if writing:
        raise UsageError(f"{writing} writes of {path} are still under way", path=path)
    if failed:
        raise StorageError(f"cannot finish {path}: a write of it failed: {failed}", path=path)


class Fetch(NamedTuple):
    """The bytes from ``offset`` on, read into ``cached`` if ``read_cached`` can, else into ``otherwise``; then
    ``then(was cached)`` is called.

    A storage may call ``seen(n)`` when the first ``n`` bytes of ``cached`` are there, so that they can be looked at
    while the processor has them at hand; in the end the same bytes may still come in ``otherwise``.
    """

    offset: int
    cached: Sequence[Buffer]
    otherwise: Sequence[Buffer]
    then: Callable[[bool], object]
    seen: Callable[[int], object] | None = None


@dataclass(frozen=True)
class StorageInfo:
    """Where a Storage keeps its objects.

    ``location`` is for people, as in error messages. ``filesystem`` is the type as the system names it ("ext4",
    "tmpfs", "nfs4"), "memory", or an object store's scheme. ``volatile`` is true where nothing survives a restart of
    the machine. The rest says how it is fastest: with so many writes, or reads, at once, where that is more than usual;
    and how many unwanted bytes a read had better take along than end and begin again after them. ``in_order`` asks for
    the writes of an object in order: it is sent as a stream, and what comes early has to be kept in memory.
    """

    location: str
    filesystem: str
    volatile: bool
    transfers: int = 0
    read_gap: int = 0
    in_order: bool = False


class ObjectWriter(Protocol):
    """An object being written; not visible as a finished object before ``finish``."""

    @property
    def alignment(self) -> int:
        """Offsets and lengths of every ``write`` must be multiples of this, and so must the buffers' addresses.

        Padding past the end is cut off by ``finish(length)``. 1 where anything goes. It may fall during the writing
        (a filesystem that refuses direct I/O only at the first write), never rise; a write aligned to an earlier value
        is always served.
        """
        ...

    async def write(self, offset: int, buffer: Buffer) -> None:
        """Writes the whole buffer at ``offset``. Several writes to disjoint ranges may be under way at once.

        The buffer is not used any more when this returns or raises. Short writes and EINTR are handled within. After a
        write that raised, by cancellation too, the object can only be aborted. Ranges never written read as zeros.
        """
        ...

    async def finish(self, length: int) -> None:
        """Ends the object at exactly ``length`` bytes, closed.

        Its bytes are durable after this, its name after ``barrier``. No write may be under way, and none is taken from
        now on. If this raises, whatever it raises, the object is not finished and can only be aborted.
        """
        ...

    async def abort(self) -> None:
        """Closes and removes the unfinished object. Never raises for an object that is gone; safe to call twice.

        Does nothing after a ``finish`` that returned, nor to an object of that name that another has made. Done whole
        even where the caller is cancelled already.
        """
        ...


class ObjectReader(Protocol):
    """An object open for reading; ``size`` is its length in bytes."""

    @property
    def size(self) -> int: ...

    @property
    def alignment(self) -> int:
        """Reads whose offset, lengths and addresses are all multiples of this are the fastest; any other is served too.

        1 where it makes no difference. The end of the object need not be aligned: let the last buffer reach past it.
        """
        ...

    async def read(self, offset: int, buffers: Sequence[Buffer]) -> int:
        """Fills the buffers, one after another, with the bytes from ``offset`` on; returns how many.

        That is the buffers' total or, where they reach past the object's end, ``size - offset`` (0 if that is
        negative); never less: EOFError if the object has become shorter than ``size``. What lies behind in the
        buffers is undefined, and after an error all of it. The buffers are not used any more when this returns or
        raises.
        """
        ...

    async def read_cached(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        """As ``read``, but only if that takes no wait for a device (the page cache has it all): True when done.

        Else False at once, nothing read ahead, with the buffers' contents undefined.
        """
        ...

    async def fetch(self, *reads: Fetch) -> None:
        """Carries out the reads, one after another, and raises what one of them or what it calls raises.

        A storage that reads on threads does all of it on one, where what is called may block: to go back to the loop in
        between, for each read of 8 MiB, costs a fifth of a load's time.
        """
        ...

    async def aclose(self) -> None:
        """Closes; safe to call twice. Done whole even where the caller is cancelled already."""
        ...


class Storage(Protocol):
    """One place that holds objects by name. Names are as ``check_name`` has them.

    An instance is used on one event loop.
    """

    @property
    def info(self) -> StorageInfo: ...

    async def create(self, name: str, length_hint: int) -> ObjectWriter:
        """Begins a new object; FileExistsError (that very type, not as a cause) if there is one.

        Makes the place itself (directories) where it is missing. ``length_hint`` is the expected length in bytes, 0
        where unknown; a place that cannot hold so much may raise ``StorageFull`` at once.
        """
        ...

    async def put(self, name: str, data: bytes) -> None:
        """Creates a whole small object; its bytes are durable after this, its name after ``barrier``.

        FileExistsError if there is one, as with ``create``. Whoever else reads or lists the name sees all of ``data``
        or nothing.
        """
        ...

    async def claim(self, name: str, data: bytes) -> bool:
        """Creates a whole small object if there is none of that name; True if this call did, else False.

        Whoever else reads the name sees all of ``data`` or nothing; of several claimers exactly one gets True. The
        object and its name are durable when True is returned. An error that leaves open whether the claim was won
        raises ``CommitUnknown``; any other error means that it was not, and that nothing of it is left. Cancellation
        is no error in this sense: a cancelled claim has come to rest, won or not, and only ``get`` tells which.
        """
        ...

    async def barrier(self) -> None:
        """Makes durable every object that is finished or put, its name, and the place itself.

        Names made or removed by others before this call are included. After a barrier that failed to sync, every
        later one of this Storage fails too, since what was lost then cannot be known.
        """
        ...

    async def get(self, name: str, limit: int) -> bytes:
        """A whole small object.

        Raises ``CorruptCheckpoint`` if it is longer than ``limit`` bytes, before it is read.
        """
        ...

    async def open(self, name: str) -> ObjectReader:
        """Opens a finished object; FileNotFoundError if there is none."""
        ...

    async def list(self) -> dict[str, int]:
        """Every finished object's name and length in bytes; empty where the place does not exist.

        Foreign names are included, temporaries not. An object of ``create`` that is unfinished, or was left so by a
        crash, may be among them, at any length: a directory cannot tell, and so it can be found and deleted. One of
        ``put`` or ``claim`` is there whole or not at all.
        """
        ...

    async def temporaries(self) -> dict[str, str]:
        """Names, which ``delete`` takes and ``list`` does not show, of what was begun and is no object yet, each with
        the name of the object that it was to become.

        They belong to creates, puts and claims that are under way, or whose process died; whose, only the object's name
        can tell. What is under way fails if they are deleted, and publishes nothing.
        """
        ...

    async def delete(self, names: Sequence[str]) -> None:
        """Removes objects and temporaries; those that are gone already are passed over. Durable after the next
        ``barrier``.
        """
        ...


async def read_small(storage: Storage, name: str, limit: int) -> bytes:
    """``Storage.get``, by way of ``open``."""
    reader = await storage.open(name)
    try:
        check_length(f"{storage.info.location}/{name}", reader.size, limit)
        data = bytearray(reader.size)
        await reader.read(0, [memoryview(data)])
        return bytes(data)
    finally:
        await reader.aclose()
