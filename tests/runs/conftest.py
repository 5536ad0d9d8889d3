"""Runs made of Records alone: what a listing sees of a checkpoint, without its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from asyncdcp.envelope import encode_record
from asyncdcp.metadata import IndexRef, Record, Summary
from asyncdcp.names import data_name, index_name, make_save_id, record_name
from asyncdcp.runs.layout import (
    LineStart,
    Segment,
    TermClaim,
    encode_claim,
    encode_line,
    line_name,
    step_name,
    term_name,
)
from asyncdcp.storage import LocalPlace, MemoryPlace, Place

Forge = Callable[..., Any]


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Any) -> Place:
    """A run with nothing in it."""
    return LocalPlace(tmp_path / "run") if request.param == "local" else MemoryPlace("run")


@pytest.fixture
def forge() -> Forge:
    """Puts one save into a run as a writer leaves it: ``await forge(place, step, …)`` gives its save id."""

    async def make(
        place: Place, step: int, term: int = 1, *, outcome: Any = "commit", attempt: int = 1, **fields: Any
    ) -> str:
        save_id = make_save_id(f"term {term}", step_name(step), attempt)
        storage = place.child(step_name(step))
        data, index = b"d" * 100, b"i" * 50
        await storage.put(data_name(save_id, 0, 0), data)
        await storage.put(index_name(save_id, 0), index)
        if outcome is None:
            return save_id
        record = Record(
            save_id=save_id,
            outcome=outcome,
            time=1e9 + step,
            world_size=1,
            versions={},
            indexes=[IndexRef(index_name(save_id, 0), 50, "")] if outcome == "commit" else [],
            summary=Summary(1, 64, 100, []) if outcome == "commit" else None,
            term=term or None,
            **fields,
        )
        await storage.put(record_name(save_id), encode_record(record))
        return save_id

    return make


@pytest.fixture
def claim() -> Forge:
    """Claims a term: ``await claim(place, 2, {1: 500})`` goes on from term 1 up to step 500."""

    async def make(place: Place, term: int, segments: dict[int, int] | None = None) -> None:
        await place.storage.put(term_name(term), encode_claim(TermClaim(term, 0.0, "here", 1)))
        if segments is not None:
            start = LineStart(term, [Segment(*segment) for segment in segments.items()])
            await place.storage.put(line_name(term), encode_line(start))

    return make
