"""A checkpointer for all tests of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asyncdcp import MemoryStorage, SyncCheckpointer


@pytest.fixture(scope="module")
def checkpointer() -> Iterator[SyncCheckpointer]:
    with SyncCheckpointer(process=False) as made:
        yield made


@pytest.fixture
def into(checkpointer: SyncCheckpointer) -> Callable[..., Any]:
    """Saves a state, and loads it into a target."""

    def load(target: Any, state: Any, **options: Any) -> Any:
        storage = MemoryStorage()
        checkpointer.save(storage, state)
        return checkpointer.load(storage, target, **options)

    return load
