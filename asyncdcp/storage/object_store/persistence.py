"""What obstore does not try again by itself: a request that was answered, but whose answer broke off."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from obstore.exceptions import BaseError

from asyncdcp.storage.object_store.failures import was_cut
from asyncdcp.storage.spec import RequestLimits

T = TypeVar("T")


async def again(limits: RequestLimits, call: Callable[[], Awaitable[T]]) -> T:
    """What ``call`` returns, called until no answer breaks off, within ``limits.retry``.

    For requests that may be carried out twice.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + limits.retry
    while True:
        try:
            return await call()
        except BaseError as error:
            if not was_cut(error) or loop.time() + limits.pause > until:
                raise
        await asyncio.sleep(limits.pause)
