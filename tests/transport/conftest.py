"""Ranks that are threads of one process, linked in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from asyncdcp.transport import MemoryHub, PGTransport, TransportOptions
from asyncdcp.transport.link import Link, Pending

LONG = 60.0  # a wait that only a failing test comes to the end of
TINY = TransportOptions(buffer_bytes=1 << 16)
"""Blocks of 4 KiB, batches of 32 KiB."""

STATE = {"w": torch.arange(25_000.0), "many": [torch.full((50,), float(n)) for n in range(100)], "n": 1}
"""Four batches of blocks."""

World = Callable[..., tuple[MemoryHub, list[PGTransport]]]


BOTH_WAYS = pytest.mark.parametrize("way", ["group", "shared"])


@pytest.fixture
def way() -> str:
    """How blocks go: over the link, or, of states larger than the buffers, by shared memory."""
    return "group"


@pytest.fixture
def world(way: str) -> Iterator[World]:
    """Makes a hub and a transport for each rank, and closes them."""

    def make(
        ranks: int = 2, timeout: float = LONG, options: TransportOptions = TINY, link: Any = None
    ) -> tuple[MemoryHub, list[PGTransport]]:
        hub = MemoryHub(ranks, may_share=way == "shared")
        links: list[Any] = [hub.link(rank) for rank in range(ranks)]
        if link is not None:
            links = [link(each) for each in links]
        transports = [PGTransport(each, timeout=timeout, options=options) for each in links]
        for transport in transports:
            made.callback(transport.close)
        return hub, transports

    with ExitStack() as made:  # all are closed, even if one of them has something to say
        yield make


def brought(transports: list[PGTransport], state: Any, into: Any = None) -> Any:
    """The state from rank 0 to rank 1."""
    send = transports[0].send_checkpoint([1], state)
    received = transports[1].recv_checkpoint(0, into).result(LONG)
    send.result(LONG)
    return received


def empty_like(state: Any) -> Any:
    """The same structure, of other content."""
    if isinstance(state, Tensor):
        return torch.empty(state.shape, dtype=state.dtype)
    if isinstance(state, dict):
        return {key: empty_like(value) for key, value in state.items()}
    return [empty_like(value) for value in state] if isinstance(state, list) else None


class Held:
    """A link whose 30th send, in the middle of a stream, waits until something was ``asked`` for: progress is told by a
    thread of its own, which may be later than all of the stream.
    """

    def __init__(self, link: Link, asked: threading.Event) -> None:
        self._link, self._asked, self._left = link, asked, 30
        self.rank, self.world_size, self.device = link.rank, link.world_size, link.device
        self.may_share = link.may_share
        self.receive = link.receive

    def send(self, peer: int, tag: int, data: Tensor) -> Pending:
        self._left -= 1
        if not self._left and self.rank == 0:
            assert self._asked.wait(LONG)
        return self._link.send(peer, tag, data)
