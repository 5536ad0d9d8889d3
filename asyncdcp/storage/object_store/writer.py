"""An object being written: a multipart upload whose parts are, where they can be, the caller's own buffers.

obstore takes an upload's parts in order, through an iterator. Three kinds of writes come:

- a whole part whose turn it is (the pipeline's slabs are parts): lent to obstore as it lies, and ``write`` returns when
  it has been sent;
- one that comes too early, since an earlier part is missing: copied, so that nobody waits for what may itself be
  waiting for the caller's buffer. At most ``PARTS_AHEAD`` are; a write beyond that fails. The pipeline sends in order
  where a storage asks for it, and what is under way at once is all that may overtake;
- less than a part: copied into the part that it belongs to.

What is no longer than a part is one conditional PUT at the end.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, Final, TypedDict

import anyio
from anyio.lowlevel import checkpoint
from obstore.exceptions import BaseError

from asyncdcp.errors import Closed, InvalidOption, StorageError
from asyncdcp.storage.object_store.claim import Claimer
from asyncdcp.storage.object_store.failures import again, said, translated, was_cut
from asyncdcp.storage.object_store.lending import Parts
from asyncdcp.storage.port import Buffer, check_finish
from asyncdcp.threads import ended

if TYPE_CHECKING:
    from obstore import PutResult

PART_BYTES: Final = 8 << 20
"""A slab. S3 takes 5 MiB to 5 GiB."""
PARTS_LIMIT: Final = 10_000
PARTS_IN_FLIGHT: Final = 12
PARTS_AHEAD: Final = 32
"""Parts that are held in memory since they are not whole, or an earlier one is missing: 256 MiB of them."""
_PATIENCE: Final = 5.0
"""Seconds that obstore gets to abort an upload, or to let go of a buffer, before that is given up."""

_logger = logging.getLogger("asyncdcp")


class Finished(TypedDict):
    """A finished object, as ``barrier`` is to find it."""

    size: int
    e_tag: str | None


class _State(Enum):
    BEGUN = "begun"
    FINISHING = "being finished"
    FINISHED = "finished"
    ABORTED = "aborted"


class ObjectStoreWriter:
    """An ``ObjectWriter``. ``on_end`` is told what was finished, or None after an abort that is whole."""

    def __init__(self, target: Claimer, name: str, length_hint: int, on_end: Callable[[Finished | None], None]) -> None:
        self._target = target
        self._name = name
        self._path = f"{target.url}/{name}"
        self._hint = length_hint
        self._part = PART_BYTES * max(1, -(-length_hint // (PART_BYTES * PARTS_LIMIT)))
        self._on_end = on_end
        self._parts = Parts(PARTS_IN_FLIGHT + 1)
        self._partial: dict[int, bytearray] = {}
        self._filled: dict[int, int] = {}
        self._next = 0
        self._upload: asyncio.Task[PutResult] | None = None
        self._single = False
        self._unanswered = False  # whether its upload was completed was asked for in vain
        self._length = -1
        self._state = _State.BEGUN
        self._writing = 0
        self._failed = ""  # what a write failed of; not the error itself, whose frames hold its buffer

    @property
    def alignment(self) -> int:
        return 1

    @property
    def parts_lent(self) -> int:
        """How many parts are with obstore now, to be sent."""
        return self._parts.lent

    async def write(self, offset: int, buffer: Buffer) -> None:
        self._check_begun()
        if offset < 0:
            raise InvalidOption(f"offset is {offset}; it takes 0 or more", path=self._path)
        self._writing += 1
        try:
            await checkpoint()
            while len(buffer):
                number, start = divmod(offset, self._part)
                piece = buffer[: self._part - start]
                await self._write_piece(number, start, piece)
                offset, buffer = offset + len(piece), buffer[len(piece) :]
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._writing -= 1

    async def _write_piece(self, number: int, start: int, piece: Buffer) -> None:
        whole = len(piece) == self._part and (number + 1) * self._part <= self._hint
        if whole and number == self._next and not piece.readonly:
            back = self._send(piece)
            self._send_filled()
            await self._wait(back)
        else:
            self._fill(number, start, piece)
            self._send_filled()
            await self._wait_for_room()

    def _fill(self, number: int, start: int, piece: Buffer) -> None:
        if number < self._next or number >= PARTS_LIMIT:
            place = f"{len(piece)} bytes at {number * self._part + start}"
            why = (
                "were written before"
                if number < self._next
                else f"are beyond {PARTS_LIMIT} parts of {self._part} bytes"
            )
            raise StorageError(f"cannot write {place} of {self._path}: they {why}", path=self._path)
        if number not in self._partial and len(self._partial) >= PARTS_AHEAD:
            ahead = f"{PARTS_AHEAD} parts of {self._part} bytes were written before part {self._next} was whole"
            raise StorageError(f"cannot write {self._path}: {ahead}; write it in order", path=self._path)
        part = self._partial.setdefault(number, bytearray())
        end = start + len(piece)
        part.extend(bytes(max(0, end - len(part))))
        if len(piece):
            into = (ctypes.c_ubyte * len(piece)).from_buffer(part, start)
            ctypes.memmove(into, _bytes_of(piece), len(piece))
        self._filled[number] = self._filled.get(number, 0) + len(piece)

    def _send_filled(self) -> None:
        """Sends copied parts that are whole, and that ``finish`` will not have to cut."""
        while self._filled.get(self._next) == self._part:
            end = (self._next + 1) * self._part
            if end > self._hint and not any(number > self._next for number in self._partial):
                return
            del self._filled[self._next]
            self._send(memoryview(self._partial.pop(self._next)))

    def _send(self, part: memoryview) -> asyncio.Event:
        if self._upload is None:
            self._upload = asyncio.create_task(self._run_upload())
            self._upload.add_done_callback(self._on_upload_end)
        self._next += 1
        return self._parts.lend(part)

    async def _run_upload(self) -> PutResult:
        """Begun anew where the answer to its beginning broke off; where that to its end was lost, the object tells."""
        key, limits = self._target.url.key(self._name), self._target.limits
        until = asyncio.get_running_loop().time() + limits.retry
        while True:
            try:
                return await self._target.store.put_async(
                    key,
                    self._parts,
                    use_multipart=True,
                    chunk_size=self._part,
                    max_concurrency=PARTS_IN_FLIGHT + 1,
                )
            except (BaseError, FileNotFoundError) as error:
                if self._parts.asked:
                    return await self._completed(error)
                if not was_cut(error) or asyncio.get_running_loop().time() > until:
                    raise
            await asyncio.sleep(limits.pause)

    async def _completed(self, error: Exception) -> PutResult:
        """An upload is completed as a whole or not at all, and nobody else writes the name: the object's length tells.

        So ``error`` is raised unless the object is there: to complete an upload a second time, since the first answer
        was lost, fails.
        """
        if self._length >= 0:
            key, store = self._target.url.key(self._name), self._target.store
            try:
                meta = await again(self._target.limits, lambda: store.head_async(key))
                if meta["size"] == self._length:
                    return {"e_tag": meta["e_tag"], "version": meta["version"]}
            except FileNotFoundError:
                pass
            except BaseError:
                self._unanswered = True
        raise error

    def _on_upload_end(self, upload: asyncio.Future[PutResult]) -> None:
        if not upload.cancelled():
            upload.exception()  # looked at; whoever waits raises it
        self._parts.give_up()
        self._parts.wake()

    async def _wait(self, back: asyncio.Event) -> None:
        """Until a lent buffer has come back. A caller that is cancelled gets it back, too: the upload ends for it."""
        try:
            while not back.is_set():
                await self._parts.wait_back()
        except BaseException:
            self._parts.give_up()
            with anyio.CancelScope(shield=True):
                await ended(asyncio.ensure_future(self._wait_quietly(back.wait)))
            raise
        self._check_upload()

    async def _wait_for_room(self) -> None:
        while self._parts.lent > PARTS_IN_FLIGHT:
            await self._parts.wait_back()
        self._check_upload()

    def _check_upload(self) -> None:
        """Raises if the upload has failed."""
        upload = self._upload
        if upload is not None and upload.done() and not self._state_is(_State.FINISHED):
            with translated("write", self._target.url, self._name):
                upload.result()
            raise StorageError(f"cannot write {self._path}: its upload has ended", path=self._path)

    def _state_is(self, state: _State) -> bool:
        return self._state is state

    # ── the end ──

    async def finish(self, length: int) -> None:
        self._check_begun()
        check_finish(self._path, length, self._writing, self._failed)
        self._state = _State.FINISHING
        try:
            finished = await (self._finish_upload(length) if self._is_long(length) else self._put(length))
        except BaseException as error:
            self._fail(error)
            raise
        self._state = _State.FINISHED
        self._on_end(finished)

    def _is_long(self, length: int) -> bool:
        return self._upload is not None or length > self._part

    async def _put(self, length: int) -> Finished:
        data = bytes(self._partial.pop(0, bytearray())[:length]).ljust(length, b"\0")
        await ended(asyncio.ensure_future(self._put_whole(data)))
        if not self._single:
            raise StorageError(f"cannot write {self._path}: somebody else has made it meanwhile", path=self._path)
        return Finished(size=length, e_tag=None)

    async def _put_whole(self, data: bytes) -> None:
        self._single = True  # or it cannot be told
        self._single = await self._target.write(self._name, data)  # what is there otherwise is theirs

    async def _finish_upload(self, length: int) -> Finished:
        self._length, sent = length, self._next * self._part
        if length < sent:
            message = f"cannot end {self._path} at {length} bytes: {sent} were sent already"
            raise StorageError(message, path=self._path)
        for number in range(self._next, -(-length // self._part)):
            size = min(self._part, length - number * self._part)
            part = self._partial.pop(number, bytearray())[:size]
            part.extend(bytes(size - len(part)))
            self._send(memoryview(part))
            del part  # it is obstore's alone now, and ends with it
            await self._wait_for_room()
        self._parts.end()
        assert self._upload is not None
        while not self._upload.done():
            await self._parts.wait_back()
        with translated("finish", self._target.url, self._name):
            return Finished(size=length, e_tag=self._upload.result()["e_tag"])

    def _fail(self, error: BaseException) -> None:
        self._failed = self._failed or said(error)
        self._parts.give_up()

    async def abort(self) -> None:
        if self._state in (_State.BEGUN, _State.FINISHING):
            self._state = _State.ABORTED
            self._parts.give_up()
            self._partial.clear()
            await ended(asyncio.ensure_future(self._abort()))

    async def _abort(self) -> None:
        upload = self._upload
        if upload is not None and not upload.done():
            await self._wait_quietly(lambda: asyncio.wait((upload,)))
            if not upload.done():
                upload.cancel()
                await self._wait_quietly(lambda: asyncio.wait((upload,)))
                _logger.warning(
                    "the upload of %s did not end; a rule for the bucket that aborts incomplete multipart uploads, or "
                    "gc, removes what was sent",
                    self._path,
                )
        failed = upload is None or (upload.done() and not upload.cancelled() and upload.exception() is not None)
        if self._single or self._unanswered or not failed:
            await self._delete()
        self._on_end(None)

    async def _delete(self) -> None:
        """Of an object whose last request was given up: it may be there. A store that did not answer is asked once."""
        store = self._target.once if self._unanswered else self._target.store
        try:
            await store.delete_async(self._target.url.key(self._name))
        except FileNotFoundError:
            pass
        except (BaseError, OSError) as error:
            _logger.warning("%s could not be removed: %s", self._path, said(error))

    async def _wait_quietly(self, event: Callable[[], object]) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await event()  # type: ignore[misc]  # both are awaitables

    def _check_begun(self) -> None:
        if self._state is not _State.BEGUN:
            raise Closed(f"{self._path} is {self._state.value}", path=self._path)


def _bytes_of(piece: Buffer) -> ctypes.Array[ctypes.c_ubyte] | bytes:
    return bytes(piece) if piece.readonly else (ctypes.c_ubyte * len(piece)).from_buffer(piece)
