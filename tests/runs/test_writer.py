"""The one who writes to a run: terms, and what may be deleted when."""

from __future__ import annotations

from typing import Any

import pytest

from asyncdcp.errors import Fenced
from asyncdcp.runs import KeepLast
from asyncdcp.runs.writer import RunWriter
from asyncdcp.storage import Place


async def test_nothing_is_deleted_for_the_sake_of_what_may_not_be_durable(place: Place, forge: Any) -> None:
    """The Record of step 3 can be seen; that it survives a loss of power is only sure once its save has resolved."""
    writer = RunWriter(place)
    await writer.open(quiet=0, deadline=0)
    await writer.go_on(None)
    for step in (1, 2, 3):
        await forge(place, step, term=1)
    gone = await writer.retain(KeepLast(1), await writer.look(), 2)
    assert [checkpoint.step for checkpoint in gone] == [1]
    assert (await writer.look()).steps() == [2, 3]
    assert [each.step for each in await writer.retain(KeepLast(1), await writer.look(), 3)] == [2]


async def test_each_writer_has_a_term_of_its_own(place: Place) -> None:
    first, second = RunWriter(place), RunWriter(place)
    await first.open(quiet=0, deadline=0)
    await second.open(quiet=0, deadline=0)
    assert (first.term, second.term) == (1, 2)
    with pytest.raises(Fenced, match="with term 2, and this one has term 1"):
        await first.look()
    await second.look()
    await second.go_on(None)
    await second.go_on(None)
    assert second.term == 3
