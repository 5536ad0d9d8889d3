"""A save to an object store: its n-th request fails, or is its process's last, for n = 1, 2, … until it is through.

Below the real storage, writer and claims is a store in memory (obstore's own) that can be told what becomes of a
request. An answer may be lost before the store carried the request out, or after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final
from unittest.mock import patch

import obstore.exceptions
from obstore.store import MemoryStore

from asyncdcp.errors import AsyncDCPError, CommitUnknown
from asyncdcp.names import make_save_id
from asyncdcp.storage.object_store import ObjectStorage
from asyncdcp.storage.object_store import storage as object_storage
from asyncdcp.storage.object_store import writer as object_writer
from tests.pipeline.forge import SLAB, writer_of
from tests.reliability.power import Figures
from tests.reliability.simulation import simulated
from tests.reliability.worlds import NOTHING, Killed, Lost, state, structure, version_at
from tests.virtual import run

REFUSED: Final = "refused"
"""The store says no, and does nothing."""
LOST: Final = "lost"
"""It never comes there, and nobody answers."""
UNANSWERED: Final = "unanswered"
"""It is carried out, and nobody answers."""
CUT: Final = "cut"
"""It is carried out, and the answer breaks off."""
FAULTS: Final = (REFUSED, LOST, UNANSWERED, CUT)
_HOPELESS: Final = 200


class Network:
    """What lies between a process and the store: request ``number`` meets with ``fault``, all later ones too if
    ``sticky``. A process that stops (``stops``) has none carried out from then on, but the first if ``fault`` says so.
    """

    def __init__(self, fault: str = "", number: int = 0, *, sticky: bool = False, stops: bool = False) -> None:
        self.fault = fault
        self.sticky = sticky
        self.stops = stops
        self.left = number
        self.happened = ""

    @property
    def stopped(self) -> bool:
        return self.stops and self.left <= 0 and bool(self.happened)

    async def send(self, request: str, carry_out: Callable[[], Any]) -> Any:
        await asyncio.sleep(0)
        if self.stopped:
            raise Killed(5, "killed")
        self.left -= 1
        if not self.fault or self.left > 0 or (self.left < 0 and not self.sticky):
            return carry_out()
        self.happened = self.happened or request
        if self.fault in (UNANSWERED, CUT):
            carry_out()
        if self.stops:
            raise Killed(5, "killed")
        raise _ERRORS[self.fault]()


_ERRORS: Final[dict[str, Callable[[], Exception]]] = {
    REFUSED: lambda: obstore.exceptions.PermissionDeniedError("Server returned non-2xx status code: 403 Forbidden"),
    LOST: lambda: obstore.exceptions.GenericError("HTTP error: error sending request (kind: Timeout, )"),
    UNANSWERED: lambda: obstore.exceptions.GenericError("Server returned non-2xx status code: 500 InternalError"),
    CUT: lambda: obstore.exceptions.GenericError("HTTP error: request or response body error (kind: Body, )"),
}


class Answer:
    """Of a GET."""

    def __init__(self, found: Any) -> None:
        self.attributes = dict(found.attributes)
        self.meta = found.meta
        self._data = bytes(found.bytes())

    async def bytes_async(self) -> bytes:
        return self._data


class Listed:
    """Of a listing, page by page."""

    def __init__(self, store: FaultyStore, prefix: str | None) -> None:
        self._store = store
        self._prefix = prefix

    async def collect_async(self) -> list[Any]:
        inner = self._store.inner
        found: list[Any] = await self._store.network.send("LIST", lambda: inner.list(self._prefix).collect())
        return found


class FaultyStore:
    """As a store of obstore's, as far as ``ObjectStorage`` uses one. ``uploads`` are those that nobody has ended."""

    def __init__(self, inner: MemoryStore, network: Network, uploads: set[str]) -> None:
        self.inner = inner
        self.network = network
        self._uploads = uploads

    async def put_async(self, key: str, data: Any, **options: Any) -> Any:
        if options.get("use_multipart"):
            return await self._upload(key, data)
        return await self.network.send(f"PUT {key}", lambda: self.inner.put(key, bytes(data), **options))

    async def _upload(self, key: str, parts: AsyncIterable[memoryview]) -> Any:
        """Ended, or aborted if anything fails, as obstore does it; whether the abort arrives is another matter."""
        body = bytearray()
        await self.network.send(f"BEGIN {key}", lambda: self._uploads.add(key))
        try:
            async for part in parts:
                data = bytes(part)
                del part
                await self.network.send(f"PART {key}", partial(body.extend, data))
            return await self.network.send(f"END {key}", lambda: self._end(key, bytes(body)))
        except BaseException:
            with suppress(obstore.exceptions.BaseError, Killed):
                await self.network.send(f"ABORT {key}", lambda: self._uploads.discard(key))
            raise

    def _end(self, key: str, body: bytes) -> Any:
        self._uploads.discard(key)
        return self.inner.put(key, body, use_multipart=False)

    async def get_async(self, key: str, *, options: Any = None) -> Answer:
        answer: Answer = await self.network.send(f"GET {key}", lambda: Answer(self.inner.get(key, options=options)))
        return answer

    async def head_async(self, key: str) -> Any:
        return await self.network.send(f"HEAD {key}", lambda: self.inner.head(key))

    async def list_with_delimiter_async(self, prefix: str | None) -> Any:
        return await self.network.send("LIST", lambda: self.inner.list_with_delimiter(prefix))

    def list(self, prefix: str | None) -> Listed:
        return Listed(self, prefix)

    async def delete_async(self, keys: str | Sequence[str]) -> None:
        await self.network.send(f"DELETE {keys}", lambda: self.inner.delete(keys))


@dataclass
class ObjectWorld:
    """A bucket, and the processes that save to one place in it. ``expected`` are the versions that may be there."""

    bucket: MemoryStore = field(default_factory=MemoryStore)
    uploads: set[str] = field(default_factory=set)
    expected: frozenset[int] = frozenset({NOTHING})
    attempts: int = 0

    @contextmanager
    def reached_by(self, network: Network) -> Iterator[ObjectStorage]:
        """The place as a new process has it. What it stores is cut into parts of a slab of these tests."""
        store = FaultyStore(self.bucket, network, self.uploads)
        with (
            patch.object(object_storage, "connect", lambda *_, **__: store),
            patch.object(object_writer, "PART_BYTES", SLAB),
        ):
            yield ObjectStorage("memory://bucket/step_1")

    async def save(self, network: Network | None = None) -> BaseException | None:
        """Saves the next version over what is there, and says what came of it: None if it is acknowledged."""
        network = network or Network()
        self.attempts += 1
        self.expected |= {self.attempts}
        options: dict[str, Any] = {
            "structure": structure(0, 1),
            "save_id": make_save_id("run", "here", self.attempts),
            "overwrite": True,
        }
        with self.reached_by(network) as storage:
            writer, slabs = writer_of(storage, state(self.attempts), **options)
            slots = len(slabs.ready)
            try:
                await writer.run()
            except AsyncDCPError as error:
                if not network.stopped and not isinstance(error, CommitUnknown):
                    self.expected -= {self.attempts}  # said to be given up: it must never be there
                return error
            assert sorted(slabs.given_back) == list(range(slots)), "a slot is not given back"
        self.expected = frozenset({self.attempts})
        return None

    async def resume(self) -> None:
        """A new process loads: it must find one of the versions that may be there."""
        with self.reached_by(Network()) as storage:
            found = await version_at(storage)
        assert found in self.expected, f"found version {found}, not one of {sorted(self.expected)}"


def sweep(
    fault: str, *, sticky: bool = False, stops: bool = False, step: int = 1, figures: Figures | None = None
) -> int:
    """All n (or each ``step``-th); returns the first that is past the end. Raises ``Lost`` with what replays it."""
    for number in range(1, _HOPELESS, step):
        network = Network(fault, number, sticky=sticky, stops=stops)
        try:
            with simulated():
                run(one(network))
        except AssertionError as error:
            replays = f"{fault}, request {number} ({network.happened}), sticky={sticky}, stops={stops}"
            raise Lost(f"{replays}: {error}") from error
        if figures is not None:
            figures.update({"faults": 1})
        if not network.happened:
            return number
    raise Lost("there is no end of requests")


async def one(network: Network) -> None:
    """Saves, saves over that with the fault, and saves again without. Nothing is lost, and no upload is left by a
    process that lives.
    """
    world = ObjectWorld()
    assert await world.save() is None
    error = await world.save(network)
    assert error is None or network.happened, f"failed without a fault: {error}"
    begun = network.happened.startswith("BEGIN")  # nobody can abort what was begun without an answer
    assert network.stopped or network.sticky or begun or not world.uploads, f"left: {world.uploads}"
    await world.resume()
    again = await world.save()
    assert again is None, f"the next save failed: {again}"
    await world.resume()
