"""ObjectStorage: a place in a bucket, behind the Storage port.

An object that a PUT created, or whose upload was completed, is whole and durable at once; the stores list and read
what they have acknowledged. So ``barrier`` has nothing to sync. It looks whether what was finished is there, as long as
it was sent and with the tag that its sending was answered with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio
from anyio import CapacityLimiter
from anyio.lowlevel import checkpoint
from obstore.exceptions import BaseError

from asyncdcp.errors import StorageError
from asyncdcp.storage.object_store.claim import Claimer
from asyncdcp.storage.object_store.connect import Access, access, connect
from asyncdcp.storage.object_store.failures import again, translated
from asyncdcp.storage.object_store.reader import ObjectStoreReader, Source
from asyncdcp.storage.object_store.uploads import Uploads
from asyncdcp.storage.object_store.url import ObjectURL, parse_url
from asyncdcp.storage.object_store.writer import PARTS_IN_FLIGHT, Finished, ObjectStoreWriter
from asyncdcp.storage.place import Found
from asyncdcp.storage.port import StorageInfo, already_there, check_name, read_small
from asyncdcp.storage.spec import ObjectStoreSpec, RequestLimits, StorageSpec
from asyncdcp.threads import ended
from asyncdcp.unwinding import ungrouped

T = TypeVar("T")

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

_READ_GAP: Final = 1 << 20
"""About what arrives while a request would be answered."""
_DELETES_IN_FLIGHT: Final = 16
_COPIES_IN_FLIGHT: Final = 4


class ObjectStorage:
    """A ``Storage`` at ``s3://bucket/prefix``, ``gs://``, ``az://container/prefix``, or ``memory://name/prefix``.

    ``config`` are options of obstore's store, on top of what the environment says; ``credentials`` is a callable that
    obstore takes as ``credential_provider`` (such a storage cannot travel). Nothing is sent yet. Raises
    ``InvalidOption`` for what is no such URL, and for options that the store does not know.

    >>> with asyncdcp.SyncCheckpointer(process=False) as checkpointer:
    ...     storage = asyncdcp.ObjectStorage("memory://bucket/step_1")
    ...     _ = checkpointer.save(storage, {"weight": torch.ones(3)})
    ...     print(checkpointer.load("memory://bucket/step_1"))
    {'weight': tensor([1., 1., 1.])}
    """

    def __init__(
        self,
        url: str,
        *,
        config: Mapping[str, str] | None = None,
        credentials: Callable[[], Any] | None = None,
        limits: RequestLimits | None = None,
    ) -> None:
        parsed = parse_url(url)
        self._begin(parsed, access(parsed, config or {}, limits or RequestLimits(), credentials))

    def _begin(self, url: ObjectURL, how: Access) -> None:
        self.url = url
        self._access = how
        self._writing: set[str] = set()
        self._unseen: dict[str, Finished] = {}
        self._lost: StorageError | None = None

    @classmethod
    def _reached(cls, url: ObjectURL, how: Access) -> ObjectStorage:
        """The storage at a URL, reached in a way that is known: the environment is not asked."""
        storage = cls.__new__(cls)
        storage._begin(url, how)
        return storage

    @classmethod
    def from_spec(cls, spec: ObjectStoreSpec) -> ObjectStorage:
        """The storage that ``spec()`` described, in whatever process."""
        return cls._reached(parse_url(spec.url), Access(spec.config, spec.profile, spec.limits))

    def spec(self) -> StorageSpec | None:
        """As ``Travels``; None for ``memory://``, and where credentials come from a callable."""
        how = self._access
        if self.url.scheme == "memory" or how.provider is not None:
            return None
        return ObjectStoreSpec(str(self.url), dict(how.config), how.profile, how.limits)

    def child(self, name: str) -> ObjectStorage:
        """The storage at that name below this one, reached in the same way."""
        return self._reached(self.url.child(check_name(name)), self._access)

    @cached_property
    def info(self) -> StorageInfo:
        return StorageInfo(
            str(self.url),
            self.url.scheme,
            volatile=self.url.scheme == "memory",
            transfers=PARTS_IN_FLIGHT,
            read_gap=_READ_GAP,
            in_order=True,
        )

    @cached_property
    def _store(self) -> ObjectStore:
        return connect(self.url, self._access)

    @cached_property
    def _claimer(self) -> Claimer:
        limits = self._access.limits
        once = connect(self.url, self._access, single=limits.claim_request)
        long = connect(self.url, self._access, single=limits.request)
        return Claimer(self.url, self._store, once, long, limits)

    @cached_property
    def _uploads(self) -> Uploads:
        return Uploads(self.url, self._access)

    @cached_property
    def _limiter(self) -> CapacityLimiter:
        return CapacityLimiter(_COPIES_IN_FLIGHT)

    async def create(self, name: str, length_hint: int) -> ObjectStoreWriter:
        check_name(name)
        if name in self._writing:
            raise self._exists(name)
        self._writing.add(name)
        try:
            if await self._is_there(name):
                raise self._exists(name)
        except BaseException:
            self._writing.discard(name)
            raise
        return ObjectStoreWriter(self._claimer, name, length_hint, partial(self._on_end, name))

    async def _again(self, call: Callable[[], Awaitable[T]]) -> T:
        return await again(self._access.limits, call)

    async def _head(self, name: str) -> ObjectMeta:
        return await self._again(lambda: self._store.head_async(self.url.key(name)))

    async def _is_there(self, name: str) -> bool:
        with translated("create", self.url, name):
            try:
                await self._head(name)
            except FileNotFoundError:
                return False
        return True

    def _on_end(self, name: str, finished: Finished | None) -> None:
        self._writing.discard(name)
        if finished is not None:
            self._unseen[name] = finished

    async def trouble(self) -> str | None:
        """What the store fails of now, by one request that is sent once; None where it answers. For who waits while a
        request is sent again and again.
        """
        try:
            with translated("list", self.url):
                await self._claimer.once.list_with_delimiter_async(self.url.key("-"))
        except StorageError as error:
            return str(error)
        return None

    async def put(self, name: str, data: bytes) -> None:
        check_name(name)
        if not await ended(asyncio.ensure_future(self._claimer.write(name, data))):
            raise self._exists(name)
        self._unseen[name] = Finished(size=len(data), e_tag=None)

    async def claim(self, name: str, data: bytes) -> bool:
        check_name(name)
        return await ended(asyncio.ensure_future(self._claimer.create("claim", name, data)))

    async def barrier(self) -> None:
        if self._lost is not None:
            raise StorageError(str(self._lost), path=self._lost.path) from self._lost
        for name in list(self._unseen):
            try:
                await self._look_for(name, self._unseen[name])
            except StorageError as error:
                self._lost = error
                raise
            del self._unseen[name]
        await checkpoint()

    async def _look_for(self, name: str, finished: Finished) -> None:
        path = f"{self.url}/{name}"
        with translated("verify", self.url, name):
            try:
                meta = await self._head(name)
            except FileNotFoundError as error:
                raise StorageError(f"{path} was stored, and is not there", path=path) from error
        if meta["size"] != finished["size"]:
            message = f"{path} has {meta['size']} bytes, and {finished['size']} were stored"
            raise StorageError(message, path=path)
        if finished["e_tag"] is not None and meta["e_tag"] not in (None, finished["e_tag"]):
            raise StorageError(f"{path} is not what was stored: its tag differs", path=path)

    async def get(self, name: str, limit: int) -> bytes:
        return await read_small(self, name, limit)

    async def open(self, name: str) -> ObjectStoreReader:
        check_name(name)
        with translated("open", self.url, name):
            meta = await self._head(name)
        source = Source(self.url, name, self._store, self._access.limits)
        return ObjectStoreReader(source, meta, self._limiter)

    async def list(self) -> dict[str, int]:
        start = len(self.url.key(""))
        with translated("list", self.url):
            found = await self._again(lambda: self._store.list_with_delimiter_async(self.url.prefix or None))
        sizes = {meta["path"][start:]: meta["size"] for meta in found["objects"]}
        return {name: size for name, size in sizes.items() if name and not name.startswith(".")}

    async def temporaries(self) -> dict[str, str]:
        return {upload.name: upload.object for upload in await self._uploads.here()}

    async def objects_below(self) -> Sequence[tuple[str, Found]]:
        """Every object below the prefix, at any depth, by its key after the prefix."""
        start = len(self.url.key(""))
        with translated("list", self.url):
            metas = await self._again(lambda: self._store.list(self.url.prefix or None).collect_async())
        return [(meta["path"][start:], Found(meta["size"], meta["last_modified"].timestamp())) for meta in metas]

    async def uploads_below(self) -> Sequence[tuple[str, str, Found]]:
        """Every unfinished upload below the prefix: its place after the prefix, its name there, and when it began."""
        return [(upload.place, upload.name, Found(0, upload.begun)) for upload in await self._uploads.below()]

    async def overwrite(self, name: str, data: bytes) -> None:
        """Puts an object in the place of one that may be there. Whoever reads it sees the one or the other."""
        with translated("write", self.url, name):
            key = self.url.key(check_name(name))
            await self._again(lambda: self._store.put_async(key, data, use_multipart=False))

    async def delete(self, names: Sequence[str]) -> None:
        uploads = [name for name in names if name.startswith(".")]
        keys = [self.url.key(check_name(name)) for name in names if name not in uploads]
        for name in names:
            self._unseen.pop(name, None)
        if uploads:
            await self._uploads.abort(uploads)
        with translated("delete from", self.url):
            if not (len(keys) > 1 and self.url.scheme in ("s3", "az") and await self._delete_together(keys)):
                await self._delete_one_by_one(keys)

    async def _delete_together(self, keys: Sequence[str]) -> bool:
        """False where that failed: some stores that otherwise speak S3's language do not know how, and Azure's calls it
        a failure where one is gone already.
        """
        try:
            await self._claimer.once.delete_async(keys)
        except (BaseError, FileNotFoundError):
            return False
        return True

    async def _delete_one_by_one(self, keys: Sequence[str]) -> None:
        limiter = CapacityLimiter(_DELETES_IN_FLIGHT)

        async def delete(key: str) -> None:
            async with limiter:
                with suppress(FileNotFoundError):
                    await self._again(lambda: self._store.delete_async(key))

        with ungrouped():
            async with anyio.create_task_group() as tasks:
                for key in keys:
                    tasks.start_soon(delete, key)

    def _exists(self, name: str) -> FileExistsError:
        return already_there(f"{self.url}/{name}")
