"""A prefix whose sub-prefixes are places of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import anyio
from anyio import CapacityLimiter

from asyncdcp.errors import CorruptCheckpoint, StorageError, StorageUnavailable
from asyncdcp.storage.object_store.failures import translated
from asyncdcp.storage.object_store.storage import ObjectStorage
from asyncdcp.storage.place import Contents, Selects, Survey
from asyncdcp.storage.port import check_name
from asyncdcp.storage.spec import RequestLimits
from asyncdcp.threads import ended
from asyncdcp.unwinding import ungrouped

_READS_IN_FLIGHT: Final = 16
_LOG_LIMIT: Final = 256 << 20


class ObjectPlace:
    """A ``Place`` at a URL of an object store; arguments as of ``ObjectStorage``."""

    def __init__(
        self,
        url: str,
        *,
        config: Mapping[str, str] | None = None,
        credentials: Callable[[], Any] | None = None,
        limits: RequestLimits | None = None,
    ) -> None:
        self._storage = ObjectStorage(url, config=config, credentials=credentials, limits=limits)

    @property
    def storage(self) -> ObjectStorage:
        return self._storage

    def child(self, name: str) -> ObjectStorage:
        return self._storage.child(name)

    async def survey(self, selects: Selects, limit: int) -> Survey:
        """One listing of all keys below the prefix, and one of its unfinished uploads where they can be seen."""
        survey = Survey()
        for key, found in await self._storage.objects_below():
            child, _, name = key.rpartition("/")
            if "/" in child or not _may_be_named(child) or not name:
                continue  # deeper than a run goes
            contents = survey.children.setdefault(child, Contents()) if child else survey.own
            (contents.temporaries if name.startswith(".") else contents.objects)[name] = found
        for child, name, found in await self._storage.uploads_below():
            if "/" not in child and _may_be_named(child):
                contents = survey.children.setdefault(child, Contents()) if child else survey.own
                contents.temporaries[name] = found
        await self._read(survey, selects, limit)
        return survey

    async def _read(self, survey: Survey, selects: Selects, limit: int) -> None:
        limiter = CapacityLimiter(_READS_IN_FLIGHT)

        async def read(contents: Contents, storage: ObjectStorage, name: str) -> None:
            async with limiter:
                try:
                    contents.read[name] = await storage.get(name, limit)
                except FileNotFoundError:
                    del contents.objects[name]
                except StorageUnavailable:
                    raise  # what could not be read now is not to be taken for damaged
                except (StorageError, CorruptCheckpoint) as error:
                    contents.unread[name] = str(error)

        with ungrouped():
            async with anyio.create_task_group() as tasks:
                for child, contents in _all(survey):
                    storage = self._storage.child(child) if child else self._storage
                    for name in list(contents.objects):
                        if selects(child, name):
                            tasks.start_soon(read, contents, storage, name)

    async def append(self, name: str, line: bytes) -> None:
        """Reads the log and writes it anew: objects cannot be added to."""
        check_name(name)
        try:
            before = await self._storage.get(name, _LOG_LIMIT)
        except FileNotFoundError:
            before = b""
        if before and not before.endswith(b"\n"):
            before += b"\n"
        with translated("append to", self._storage.url, name):
            await ended(asyncio.ensure_future(self._storage.overwrite(name, before + line + b"\n")))

    async def discard(self, name: str, temporaries: Sequence[str] = ()) -> None:
        """A prefix is gone with its last object."""
        child = self._storage.child(name)
        if temporaries:
            await child.delete(temporaries)


def _all(survey: Survey) -> Iterable[tuple[str, Contents]]:
    return [("", survey.own), *survey.children.items()]


def _may_be_named(child: str) -> bool:
    try:
        return not child or bool(check_name(child))
    except ValueError:
        return False
