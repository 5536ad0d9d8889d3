"""Conditional PUTs over a network that loses requests and answers: never two winners, never a false answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from asyncdcp.errors import CommitUnknown, StorageError
from tests.object_store.conftest import Make
from tests.object_store.proxy import Proxy, Request, proxied

SHORT = {"claim_request": 0.4}
HOPELESS = {"claim_request": 0.4, "claim": 0.6}


@pytest.fixture
async def proxy(endpoint: str) -> AsyncIterator[Proxy]:
    async with proxied(endpoint) as proxy:
        yield proxy


def first(proxy: Proxy, *faults: str) -> None:
    """The first claims meet with ``faults``, in order."""
    left = list(faults)
    proxy.choose = lambda request: left.pop(0) if request.is_claim and left else ""


@pytest.mark.parametrize(
    "faults",
    [
        *[("500",), ("503", "503"), ("409",), ("reset",), ("after 500",), ("after reset",)],
        *[("after 503", "reset"), ("reset", "after reset", "500"), ("after 409",)],
    ],
    ids=", ".join,
)
async def test_a_claim_is_won_whatever_is_lost(make: Make, proxy: Proxy, faults: tuple[str, ...]) -> None:
    storage = make(via=proxy.url)
    first(proxy, *faults)
    generator = random.getstate()  # a trainer's, who saves it to draw the same again
    assert await storage.claim("r", b"mine") is True
    assert random.getstate() == generator
    assert await make(storage.info.location).get("r", 10) == b"mine"
    assert await make(storage.info.location).claim("r", b"mine") is False


@pytest.mark.parametrize("fault", ["stall", "after stall"])
async def test_a_claim_whose_answer_never_comes_is_tried_again(make: Make, proxy: Proxy, fault: str) -> None:
    storage = make(via=proxy.url, **SHORT)
    first(proxy, fault)
    assert await storage.claim("r", b"mine") is True


@pytest.mark.parametrize("faults", [("reset",), ("500",), ("503", "409")], ids=", ".join)
async def test_who_comes_second_over_a_bad_network_loses(make: Make, proxy: Proxy, faults: tuple[str, ...]) -> None:
    storage = make(via=proxy.url)
    assert await make(storage.info.location).claim("r", b"theirs") is True
    first(proxy, *faults)
    assert await storage.claim("r", b"mine") is False
    assert await storage.get("r", 10) == b"theirs"


async def test_a_claim_that_stays_open_is_unknown(make: Make, proxy: Proxy) -> None:
    storage = make(via=proxy.url, **HOPELESS)
    proxy.choose = lambda request: "reset" if request.is_claim else ""
    with pytest.raises(CommitUnknown, match=r"cannot be told after 0\.6 s"):
        await storage.claim("r", b"mine")
    with pytest.raises(StorageError) as caught:
        await storage.put("r", b"mine")
    assert not isinstance(caught.value, CommitUnknown)


async def test_a_claim_carried_out_while_nothing_can_be_read_is_unknown(make: Make, proxy: Proxy) -> None:
    storage = make(via=proxy.url, retry=0.2, **HOPELESS)
    proxy.choose = lambda request: "after reset" if request.is_claim else "reset"
    with pytest.raises(CommitUnknown):
        await storage.claim("r", b"mine")


async def test_what_is_refused_is_not_unknown(make: Make, proxy: Proxy) -> None:
    storage = make(via=proxy.url)
    first(proxy, "403")
    with pytest.raises(StorageError, match="access was denied") as caught:
        await storage.claim("r", b"mine")
    assert not isinstance(caught.value, CommitUnknown)
    assert proxy.count("PUT", "403") == 1
    nowhere = make(via="http://127.0.0.1:1", claim=0.6)
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL") as caught:
        await nowhere.claim("r", b"mine")
    assert not isinstance(caught.value, CommitUnknown)


async def test_a_cancelled_claim_has_come_to_rest(make: Make, proxy: Proxy) -> None:
    """Whoever was cancelled may read what became of it: the request is not under way any more."""
    storage = make(via=proxy.url, **SHORT)
    first(proxy, "after stall")
    claim = asyncio.create_task(storage.claim("r", b"mine"))
    await proxy.stalled.wait()
    claim.cancel()
    with pytest.raises(asyncio.CancelledError):
        await claim
    assert proxy.count("PUT") >= 1  # the second try saw its own
    assert await storage.get("r", 10) == b"mine"


def test_many_processes_over_a_bad_network_have_one_winner(make: Make, lean_endpoint: str) -> None:
    async def race() -> None:
        async with proxied(lean_endpoint) as proxy:
            faults = ["", "after reset", "500", "after 500", "reset", "409", ""]

            def choose(request: Request) -> str:
                return faults[len(proxy.seen) % len(faults)] if request.is_claim else ""

            proxy.choose = choose
            place = make().info.location
            claims = [make(place, via=proxy.url).claim("r", b"%d" % n) for n in range(12)]
            won = await asyncio.gather(*claims)
            assert sum(won) == 1
            assert await make(place, via=lean_endpoint).get("r", 10) == b"%d" % won.index(True)

    asyncio.run(race())


async def test_an_end_that_is_cancelled_leaves_what_another_has_made(make: Make, proxy: Proxy) -> None:
    storage = make(via=proxy.url)
    writer = await storage.create("a", 0)
    await make(storage.info.location).put("a", b"theirs")
    first(proxy, "stall")
    finishing = asyncio.create_task(writer.finish(4))
    await proxy.stalled.wait()
    finishing.cancel()
    proxy.release.set()  # it is sent again, and loses
    with pytest.raises(asyncio.CancelledError):
        await finishing
    await writer.abort()
    assert await storage.get("a", 6) == b"theirs"
