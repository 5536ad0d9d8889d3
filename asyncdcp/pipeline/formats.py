"""Opening a place for reading, whatever format it holds: asyncdcp's own, or one whose reader is installed.

A reader of another format is an entry point of the group ``asyncdcp.readers``: a coroutine function that is given a
``ForeignPlace`` and returns a ``ReadableCheckpoint``, or None if the place is not of its format. The entry point's name
is the format's, for messages. Readers are asked in the order of their names, and only where there is no checkpoint of
asyncdcp's own.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import entry_points
from typing import NamedTuple, Protocol, TypeAlias

from anyio import CancelScope, to_thread

from asyncdcp.errors import AsyncDCPError, CheckpointNotFound
from asyncdcp.extensions import ExtensionRegistry
from asyncdcp.metadata import Metadata
from asyncdcp.pipeline.descriptions import Viewer
from asyncdcp.pipeline.reader import CheckpointReader
from asyncdcp.pipeline.windows import ReadRange
from asyncdcp.runs.layout import step_of
from asyncdcp.runs.listing import Run
from asyncdcp.storage import Place
from asyncdcp.storage.local import ForeignDirectory, LocalStorage
from asyncdcp.storage.port import Storage
from asyncdcp.trace import Trace

GROUP = "asyncdcp.readers"


class ForeignPlace(NamedTuple):
    """A place that may hold another format. ``name`` is the object that the caller named, None for all of the place.

    ``storage`` opens, gets and lists objects of any name; whoever only reads formats calls nothing else of it.
    """

    storage: Storage
    name: str | None


def foreign_place(storage: Storage) -> ForeignPlace:
    """The place of a storage as readers of other formats see it. May block for a moment."""
    if not isinstance(storage, LocalStorage):
        return ForeignPlace(storage, None)
    path = storage.info.location
    directory, name = os.path.split(path)
    if storage.is_file():
        return ForeignPlace(ForeignDirectory(directory), name)
    return ForeignPlace(ForeignDirectory(path), None)


class ReadableCheckpoint(Protocol):
    """A checkpoint open for loading.

    A reader of another format makes ``metadata`` of what it found, checked: every tensor's chunks cover it exactly and
    each has a location. ``ChunkLocation.file`` may be any name that the reader itself knows; a location's bytes are the
    chunk's elements, row-major and little-endian. ``tree`` and ``values`` are as ``state_dict.flatten`` makes them.
    """

    @property
    def metadata(self) -> Metadata: ...

    async def read(self, ranges: Sequence[ReadRange], trace: Trace) -> None:
        """Reads ranges of the locations of ``metadata``. Each has ``into`` or ``deliver``, see ``ReadRange``.

        What the format has checksums for is verified before ``deliver`` sees it, or before this returns. On return and
        on raise no buffer is in use any more.
        """
        ...

    async def aclose(self) -> None:
        """Closes what is open; safe to call twice. Done whole even where the caller is cancelled already."""
        ...


ForeignReader: TypeAlias = Callable[[ForeignPlace], Awaitable[ReadableCheckpoint | None]]
"""What an entry point names. It raises ``CorruptCheckpoint`` and its kin for a place that is of its format and damaged,
and reads no tensor yet."""


async def open_checkpoint(
    storage: Storage,
    viewer: Viewer | None = None,
    registry: ExtensionRegistry | None = None,
    *,
    data: bool = True,
) -> ReadableCheckpoint:
    """Opens the checkpoint at ``storage``: asyncdcp's own if there is one, else the first that a reader knows.
    ``registry`` finds the extensions that its data needs; with ``data=False`` neither they nor the data
    files are looked for.

    Raises as ``CheckpointReader.open`` does, which says what ``viewer`` is; ``CheckpointNotFound`` names readers that
    could not be loaded.
    """
    place = await to_thread.run_sync(foreign_place, storage)
    location = storage.info.location
    missing = CheckpointNotFound(f"no checkpoint at {location}", path=location)
    if place.name is None:
        try:
            return await CheckpointReader.open(storage, viewer, registry, data=data)
        except CheckpointNotFound as error:
            missing = error
    broken = []
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            reader: ForeignReader = await to_thread.run_sync(entry.load)
        except Exception as error:  # noqa: BLE001  # one that is broken must not hide the others
            broken.append(f"the reader of {entry.name} could not be loaded: {type(error).__name__}: {error}")
            continue
        found = await reader(place)
        if found is not None:
            return found
    if not broken:
        raise missing
    raise CheckpointNotFound("; ".join((str(missing), *broken)), path=location)


async def newest_foreign(place: Place, run: Run) -> str | None:
    """The folder of the highest step that holds a checkpoint of another format; None where there is none.

    For a message about a run that has nothing to resume from: only the highest ``step_<number>`` without a checkpoint
    of asyncdcp's is opened, and one that cannot be opened counts as none.
    """
    own = {checkpoint.name for checkpoint in run.checkpoints}
    steps = {name: step for name in run.survey.children if name not in own and (step := step_of(name)) is not None}
    newest = max(steps, key=lambda name: steps[name], default=None)
    if newest is None:
        return None
    try:
        reader = await open_checkpoint(place.child(newest), data=False)
    except AsyncDCPError:
        return None
    with CancelScope(shield=True):
        await reader.aclose()
    return newest
