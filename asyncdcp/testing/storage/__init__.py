"""What the Storage port promises, as checks that any implementation can be put to.

    kit = StorageKit(lambda: MyStorage(new_place()), lambda storage: MyStorage(storage.place))

    @pytest.mark.parametrize("check", STORAGE_CHECKS, ids=lambda check: check.__name__)
    async def test_conformance(check):
        await check(kit)

Each check makes what it needs, raises ``AssertionError`` where a promise is broken, and may be run on any asyncio loop.
What no call can show (that what is durable survives a loss of power) is not among them: see ``testing.disk``.
"""

from __future__ import annotations

from typing import Final

from asyncdcp.storage import open_spec, spec_of
from asyncdcp.testing.storage import contents, lifetimes, names
from asyncdcp.testing.storage.kit import Check, StorageKit, page_buffer

__all__ = ["STORAGE_CHECKS", "Check", "StorageKit", "page_buffer"]


async def it_says_what_it_is(kit: StorageKit) -> None:
    storage = kit.make()
    info = storage.info
    assert info.location and info.filesystem
    assert kit.again(storage).info == info


async def it_travels(kit: StorageKit) -> None:
    """A spec, if it has one, opens the same place in another process."""
    storage = kit.make()
    await storage.put("a", b"1")
    spec = spec_of(storage)
    if spec is not None:
        assert await open_spec(spec).get("a", 1) == b"1"


STORAGE_CHECKS: Final[tuple[Check, ...]] = (
    *contents.CHECKS,
    *names.CHECKS,
    *lifetimes.CHECKS,
    it_says_what_it_is,
    it_travels,
)
"""Every check; a name says what is promised."""
