"""Warnings name the line of the user's that they are about."""

from __future__ import annotations

import pytest

from asyncdcp import AsyncCheckpointer, CheckpointManager, SyncCheckpointer
from asyncdcp.errors import ExtensionOrderWarning, VolatileStorageWarning
from asyncdcp.extensions import AESGCM, ZStandard


def test_through_every_way_in() -> None:
    with pytest.warns(VolatileStorageWarning, match="is kept in memory") as found:
        with SyncCheckpointer(process=False) as checkpointer:
            checkpointer.save("memory://warn/one", {"x": 1})
        with CheckpointManager("memory://warn/run", process=False) as manager:
            manager.save(1, {"x": 1}).result()
    assert [each.filename for each in found] == [__file__] * 2


def test_of_a_constructor() -> None:
    extensions = [AESGCM(b"k" * 32), ZStandard()]
    with pytest.warns(ExtensionOrderWarning) as found, AsyncCheckpointer(process=False, extensions=extensions):
        pass
    assert [each.filename for each in found] == [__file__]
