"""Ranks that are threads of one process, linked in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asyncdcp.transport import MemoryHub, PGTransport, TransportOptions

LONG = 60.0  # a wait that only a failing test comes to the end of
TINY = TransportOptions(buffer_bytes=1 << 16)
"""Blocks of 4 KiB, batches of 32 KiB."""

World = Callable[..., tuple[MemoryHub, list[PGTransport]]]


@pytest.fixture
def world() -> Iterator[World]:
    """Makes a hub and a transport for each rank, and closes them."""
    made: list[PGTransport] = []

    def make(
        ranks: int = 2, timeout: float = LONG, options: TransportOptions = TINY, link: Any = None
    ) -> tuple[MemoryHub, list[PGTransport]]:
        hub = MemoryHub(ranks)
        links: list[Any] = [hub.link(rank) for rank in range(ranks)]
        if link is not None:
            links = [link(each) for each in links]
        transports = [PGTransport(each, timeout=timeout, options=options) for each in links]
        made.extend(transports)
        return hub, transports

    yield make
    for transport in made:
        transport.close()
