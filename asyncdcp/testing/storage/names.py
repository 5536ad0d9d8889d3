"""What is promised of names: who makes one makes it alone, what is gone is gone, and what no name is is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from asyncdcp.errors import InvalidOption, StorageError
from asyncdcp.testing.storage.kit import Check, StorageKit, raises

_BAD_NAMES: Final = ("", ".", "..", ".a", "a/b", "/a", "a b", "ä", "a\0", "a\n", "a" * 201, "/etc/passwd")


async def what_exists_is_not_made_again(kit: StorageKit) -> None:
    """By whom and how ever it was made; the errors are plain ``FileExistsError``."""
    storage = kit.make()
    await storage.put("a", b"first")
    for other in (storage, kit.again(storage)):
        for call in (partial(other.put, "a", b"second"), partial(other.create, "a", 10)):
            try:
                await call()
            except FileExistsError as error:
                assert not isinstance(error, StorageError)
            else:
                raise AssertionError("what exists was made again")
        assert await other.claim("a", b"third") is False
        assert await other.get("a", 5) == b"first"
        assert await other.list() == {"a": 5}


async def what_is_missing(kit: StorageKit) -> None:
    storage = kit.make()
    assert await storage.list() == {}
    await storage.barrier()
    await storage.delete(["a", "b"])
    for call in (partial(storage.get, "a", 1), partial(storage.open, "a")):
        with raises(FileNotFoundError):
            await call()


async def delete_passes_over_what_is_gone(kit: StorageKit) -> None:
    storage = kit.make()
    await storage.put("a", b"1")
    await storage.put("b", b"2")
    await storage.delete(["x", "a", "y"])
    await storage.barrier()
    assert await storage.list() == await kit.again(storage).list() == {"b": 1}
    assert await storage.claim("a", b"3") is True


async def of_many_claims_one_wins(kit: StorageKit) -> None:
    storage = kit.make()
    claimers = [kit.again(storage) for _ in range(20)]
    async with asyncio.TaskGroup() as group:
        claims = [group.create_task(claimer.claim("r", b"%d" % n)) for n, claimer in enumerate(claimers)]
    winners = [n for n, claim in enumerate(claims) if claim.result()]
    assert len(winners) == 1, f"{len(winners)} of 20 claims were won"
    assert await storage.get("r", 10) == b"%d" % winners[0]
    assert await storage.temporaries() == {}


async def bad_names_are_refused(kit: StorageKit) -> None:
    storage = kit.make()
    for name in _BAD_NAMES:
        calls: tuple[Callable[[], Awaitable[object]], ...] = (
            *(partial(storage.create, name, 0), partial(storage.put, name, b""), partial(storage.claim, name, b"")),
            *(partial(storage.get, name, 1), partial(storage.open, name), partial(storage.delete, ["fine", name])),
        )
        for call in calls:
            with raises(InvalidOption, "name"):
                await call()
    assert await storage.list() == {}


async def the_longest_name_is_served(kit: StorageKit) -> None:
    storage = kit.make()
    assert await storage.claim("a" * 200, b"x")
    await storage.put("b" * 200, b"y")
    assert await storage.get("a" * 200, 1) == b"x"


async def nothing_is_left_of_what_ended(kit: StorageKit) -> None:
    """No temporaries of puts and claims, won or lost."""
    storage = kit.make()
    await storage.put("a", b"1")
    assert await storage.claim("b", b"2")
    assert not await storage.claim("b", b"3")
    assert await storage.temporaries() == {}
    assert await storage.list() == {"a": 1, "b": 1}


CHECKS: Final[tuple[Check, ...]] = (
    what_exists_is_not_made_again,
    what_is_missing,
    delete_passes_over_what_is_gone,
    of_many_claims_one_wins,
    bad_names_are_refused,
    the_longest_name_is_served,
    nothing_is_left_of_what_ended,
)
