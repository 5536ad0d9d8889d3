"""Creating an object exclusively: one conditional PUT (``If-None-Match: *``), and what to make of its answers.

Every request carries a token of its call, which the store keeps as the object's metadata. So a PUT whose answer was
lost may be sent again: whether the object that stands in its way is its own can be seen. There are three kinds of
answers. 2xx: won. 412, or 409 for a conflict with another request: read what is there. Anything else: refused for
certain (it was never sent, or the store says so), or open, and then it is sent again until one of the others comes.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from obstore.exceptions import AlreadyExistsError, BaseError

from asyncdcp.errors import CommitUnknown, StorageUnavailable
from asyncdcp.storage.object_store.failures import known, said, status_of, was_refused
from asyncdcp.storage.object_store.url import ObjectURL
from asyncdcp.storage.spec import RequestLimits

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_TOKEN: Final = "asyncdcptoken"
"""Azure takes no dash in such a name, and servers behind a gateway often no underscore."""
_LONG: Final = 1 << 20
"""Bytes beyond which an object is given the time of a part, not that of a claim."""
_LONGEST_PAUSE: Final = 5.0
_PASSING: Final = (408, 409, 425, 429)
"""Answers that may be others a moment later, though the request was not carried out."""


@dataclass(frozen=True)
class Claimer:
    """What a conditional PUT needs. ``once``, and with more patience ``once_long``, send each request once, ``store``
    (of the writers) tries again.
    """

    url: ObjectURL
    store: ObjectStore
    once: ObjectStore
    once_long: ObjectStore
    limits: RequestLimits

    async def create(self, operation: str, name: str, data: bytes | memoryview) -> bool:
        """Creates the object if there is none; True if this call did.

        ``CommitUnknown`` if that cannot be told in time; any other error means that it did not. Not to
        be cancelled: run it by ``threads.ended``.
        """
        key, token = self.url.key(name), secrets.token_hex(16)
        put = (self.once_long if len(data) > _LONG else self.once).put_async
        until = asyncio.get_running_loop().time() + self._seconds(data)
        open_error: Exception | None = None
        pause = self.limits.pause
        while True:
            try:
                await put(key, data, mode="create", attributes={_TOKEN: token}, use_multipart=False)
            except AlreadyExistsError as error:
                mine = await self._is_mine(key, token, data)
                if mine is not None:
                    return mine
                last: Exception = error
            except (BaseError, OSError) as error:
                last = error
                if was_refused(error):
                    if open_error is None and not _may_pass(error):
                        raise known(operation, self.url, name, error) from error
                else:
                    open_error = error
            else:
                return True
            if asyncio.get_running_loop().time() + pause > until:
                break
            # Not by the generator of a trainer, who saves it to draw the same again.
            await asyncio.sleep(pause * secrets.SystemRandom().uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)
        return await self._last_look(operation, name, token, data, open_error or last)

    async def write(self, name: str, data: bytes | memoryview) -> bool:
        """``create`` of what is no claim: nothing hangs on it, and what cannot be told is ``StorageUnavailable``."""
        try:
            return await self.create("write", name, data)
        except CommitUnknown as error:
            raise StorageUnavailable(str(error), path=error.path) from error.__cause__

    def _seconds(self, data: bytes | memoryview) -> float:
        return self.limits.retry if len(data) > _LONG else self.limits.claim

    async def _is_mine(self, key: str, token: str, data: bytes | memoryview) -> bool | None:
        """Whose the object is; None if there is none, or it cannot be read now."""
        try:
            found = await self.once.get_async(key)
            if (theirs := found.attributes.get(_TOKEN)) is not None:
                return bool(theirs == token)
            return found.meta["size"] == len(data) and bytes(await found.bytes_async()) == data
        except (BaseError, OSError):
            return None

    async def _last_look(
        self, operation: str, name: str, token: str, data: bytes | memoryview, error: Exception
    ) -> bool:
        mine = await self._is_mine(self.url.key(name), token, data)
        if mine is not None:
            return mine
        if was_refused(error):
            raise known(operation, self.url, name, error) from error
        path = f"{self.url}/{name}"
        raise CommitUnknown(
            f"whether {path} was created cannot be told after {self._seconds(data):g} s: {said(error)}", path=path
        ) from error


def _may_pass(error: Exception) -> bool:
    """Whether a refusal may be none at the next try: no connection, or a store that is busy."""
    status = status_of(error)
    return (status is None and "builder error" not in str(error)) or status in _PASSING
