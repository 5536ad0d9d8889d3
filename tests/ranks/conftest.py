"""Ranks that are threads of one process and meet in a store in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]  # torch exports them without saying so

from asyncdcp.ranks import StoreRanks

Everywhere = Callable[..., list[Any]]


def make_ranks(world_size: int, deadline: float = 30.0, store: Any = None) -> list[StoreRanks]:
    """All ranks of a job, each for a thread of its own."""
    meeting = store or HashStore()
    return [StoreRanks(PrefixStore("job", meeting), rank, world_size, deadline=deadline) for rank in range(world_size)]


@pytest.fixture
def everywhere() -> Iterator[Everywhere]:
    """Calls a function once for each of some arguments, each on a thread, and returns the results, or the errors."""
    with ThreadPoolExecutor(16) as pool:

        def run(function: Callable[..., Any], *columns: Any) -> list[Any]:
            jobs: list[Future[Any]] = [pool.submit(function, *row) for row in zip(*columns, strict=True)]
            return [job.exception(60) or job.result() for job in jobs]

        yield run
