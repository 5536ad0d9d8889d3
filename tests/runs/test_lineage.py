"""Which checkpoints count, after restarts, rollbacks and writers that were replaced."""

from __future__ import annotations

from typing import Any

from asyncdcp.runs import look
from asyncdcp.runs.layout import Line, LineStart, Segment, current_line
from asyncdcp.storage import Place


def test_without_claims_all_is_on_the_line() -> None:
    line = current_line([], [0, 3])
    assert line.holds(0, 10**9) and line.holds(3, 1) and not line.holds(1, 1)


def test_the_newest_term_decides() -> None:
    starts = [LineStart(1, []), LineStart(3, [Segment(1, 500)]), LineStart(2, [Segment(1, 900)])]
    line = current_line(starts, [])
    assert [line.holds(*at) for at in ((1, 500), (1, 600), (2, 550), (3, 600))] == [True, False, False, True]


def test_a_rollback_of_a_rollback_cuts_every_earlier_term() -> None:
    line = Line(3, {1: 500, 2: 700, 3: None})
    assert line.going_on(4, ("id", 600)) == LineStart(4, [Segment(1, 500), Segment(2, 600), Segment(3, 600)], "id")
    assert line.going_on(4, ("id", 400)) == LineStart(4, [Segment(1, 400), Segment(2, 400), Segment(3, 400)], "id")
    assert line.going_on(4, None) == LineStart(4, [])


async def test_what_a_rollback_left_behind_is_not_latest(place: Place, forge: Any, claim: Any) -> None:
    await claim(place, 1, {})
    for step in (400, 500, 900):
        await forge(place, step, term=1)
    await claim(place, 2, {1: 500})
    run = await look(place)
    assert (run.steps(), run.line.term) == ([400, 500], 2)
    await forge(place, 600, term=2)
    late = await forge(place, 600, term=1)  # a writer of the first term that did not know, at a step saved anew
    run = await look(place)
    assert run.steps() == [400, 500, 600]
    latest = run.latest()
    assert latest is not None and latest.save_id != late and latest.state == "committed"
    assert [(each.step, each.on_line) for each in run.checkpoints if each.term == 1][-2:] == [
        (600, False),
        (900, False),
    ]


async def test_a_term_that_came_to_nothing_changes_nothing(place: Place, forge: Any, claim: Any) -> None:
    await claim(place, 1, {})
    await forge(place, 10, term=1)
    await claim(place, 2)  # its writer died before it knew what to go on from
    run = await look(place)
    assert (run.term, run.line.term, run.steps()) == (2, 1, [10])
