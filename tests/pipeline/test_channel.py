from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

import anyio
import pytest
from anyio import wait_all_tasks_blocked
from anyio.lowlevel import checkpoint

from asyncdcp.pipeline.channel import Channel, ChannelStatistics


def everywhere(test: Callable[[], Awaitable[None]]) -> Callable[[str], None]:
    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def run(backend: str) -> None:
        anyio.run(test, backend=backend)

    return run


@everywhere
async def test_first_in_first_out_and_the_end() -> None:
    channel: Channel[int] = Channel(100)
    with channel:
        for n in range(5):
            await channel.send(n, 1)
    assert [n async for n in channel] == [0, 1, 2, 3, 4]
    with pytest.raises(anyio.EndOfStream):
        await channel.receive()
    with pytest.raises(anyio.ClosedResourceError):
        await channel.send(6, 1)
    channel.close()


@everywhere
async def test_as_many_bytes_as_the_bound_and_no_more() -> None:
    channel: Channel[str] = Channel(10)
    await channel.send("a", 4)
    await channel.send("b", 6)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(channel.send, "c", 1)
        await wait_all_tasks_blocked()
        tasks.start_soon(channel.send, "d", 0)
        await wait_all_tasks_blocked()
        assert channel.statistics() == ChannelStatistics(2, 10, 10, 10, 2, 0)
        assert await channel.receive() == "a"
        await wait_all_tasks_blocked()
        assert channel.statistics() == ChannelStatistics(3, 7, 10, 10, 0, 0)
    assert [await channel.receive() for _ in "bcd"] == ["b", "c", "d"]
    assert channel.statistics() == ChannelStatistics(0, 0, 10, 10, 0, 0)


@everywhere
async def test_an_oversize_item_passes_alone() -> None:
    channel: Channel[str] = Channel(10)
    await channel.send("small", 1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(channel.send, "huge", 100)
        await wait_all_tasks_blocked()
        tasks.start_soon(channel.send, "late", 1)  # there is room, but its turn comes behind
        await wait_all_tasks_blocked()
        assert channel.statistics().waiting_senders == 2
        assert await channel.receive() == "small"
        await wait_all_tasks_blocked()
        assert channel.statistics() == ChannelStatistics(1, 100, 100, 10, 1, 0)
        assert await channel.receive() == "huge"
        assert await channel.receive() == "late"


@everywhere
async def test_waiting_receivers_are_served_in_order() -> None:
    channel: Channel[int] = Channel(10)
    got: list[tuple[int, int]] = []

    async def receive(who: int) -> None:
        got.append((who, await channel.receive()))

    async with anyio.create_task_group() as tasks:
        for who in range(4):
            tasks.start_soon(receive, who)
            await wait_all_tasks_blocked()
        assert channel.statistics().waiting_receivers == 4
        for n in range(4):
            await channel.send(n, 1)
    assert got == [(n, n) for n in range(4)]


@everywhere
async def test_a_cancelled_sender_s_turn_passes_on() -> None:
    """Cancelled while it waits, or as it is woken: then either of the two may win, and nothing is lost or doubled."""
    for woken in (False, True):
        channel: Channel[str] = Channel(10)
        await channel.send("a", 10)
        got = []
        async with anyio.create_task_group() as tasks:
            scope = anyio.CancelScope()

            async def give_up(channel: Channel[str], scope: anyio.CancelScope) -> None:
                with scope:
                    await channel.send("first", 10)

            tasks.start_soon(give_up, channel, scope)
            await wait_all_tasks_blocked()
            tasks.start_soon(channel.send, "b", 5)
            await wait_all_tasks_blocked()
            if woken:
                got.append(await channel.receive())
            scope.cancel()
            await wait_all_tasks_blocked()
            while "b" not in got:
                got.append(await channel.receive())
        assert got == ["a", "b"] if scope.cancelled_caught else woken and got == ["a", "first", "b"]
        assert channel.statistics().items == channel.statistics().waiting_senders == 0


@everywhere
async def test_a_cancelled_receiver_takes_nothing() -> None:
    for woken in (False, True):
        channel: Channel[str] = Channel(10)
        got: list[str] = []
        async with anyio.create_task_group() as tasks:
            scope = anyio.CancelScope()

            async def receive(channel: Channel[str], scope: anyio.CancelScope, got: list[str]) -> None:
                with scope:
                    got.append(await channel.receive())

            tasks.start_soon(receive, channel, scope, got)
            await wait_all_tasks_blocked()
            tasks.start_soon(receive, channel, anyio.CancelScope(), got)
            await wait_all_tasks_blocked()
            if woken:
                await channel.send("a", 1)
            scope.cancel()
            await wait_all_tasks_blocked()
            await channel.send("b", 1)
            if woken and not scope.cancelled_caught:
                await wait_all_tasks_blocked()
            elif woken:
                got.append(await channel.receive())
        assert got == (["a", "b"] if woken else ["b"])


@everywhere
async def test_closing_wakes_everybody() -> None:
    full: Channel[int] = Channel(1)
    await full.send(0, 1)
    empty: Channel[int] = Channel(1)
    ended: list[type[Exception]] = []

    async def expect(kind: type[Exception], channel: Channel[int]) -> None:
        with pytest.raises(kind):
            await (channel.receive() if channel is empty else channel.send(1, 1))
        ended.append(kind)

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(expect, anyio.ClosedResourceError, full)
            tasks.start_soon(expect, anyio.EndOfStream, empty)
        await wait_all_tasks_blocked()
        full.close()
        empty.close()
    assert len(ended) == 6
    assert await full.receive() == 0


@everywhere
async def test_drop_lets_go_of_what_was_sent() -> None:
    channel: Channel[int] = Channel(2)
    await channel.send(0, 2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(expect_closed, channel)
        await wait_all_tasks_blocked()
        channel.drop()
    assert channel.statistics() == ChannelStatistics(0, 0, 2, 2, 0, 0)
    with pytest.raises(anyio.EndOfStream):
        await channel.receive()


async def expect_closed(channel: Channel[int]) -> None:
    with pytest.raises(anyio.ClosedResourceError):
        await channel.send(1, 1)


@everywhere
async def test_many_of_both_with_cancellations_lose_nothing() -> None:
    channel: Channel[int] = Channel(7)
    sent: list[int] = []
    got: list[int] = []

    async def send(n: int) -> None:
        with anyio.move_on_after(0) if n % 3 == 0 else anyio.CancelScope():
            await channel.send(n, n % 10)
            sent.append(n)

    async def receive(n: int) -> None:
        with suppress(anyio.EndOfStream), anyio.CancelScope() as scope:
            if n % 5 == 0:
                tasks.start_soon(cancel, scope)
            got.append(await channel.receive())

    async def cancel(scope: anyio.CancelScope) -> None:
        await checkpoint()
        scope.cancel()

    async with anyio.create_task_group() as tasks:
        for n in range(100):
            tasks.start_soon(send, n)
            tasks.start_soon(receive, n)
        await wait_all_tasks_blocked()
        channel.close()
        got.extend([n async for n in channel])
        tasks.cancel_scope.cancel()
    assert sorted(got) == sorted(sent) and len(got) >= 50
    assert channel.statistics().peak_bytes <= 9
