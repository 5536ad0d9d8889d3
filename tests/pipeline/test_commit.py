from __future__ import annotations

from itertools import product

import pytest

from asyncdcp.pipeline.commit import FINAL, TRANSITIONS, Action, CommitMachine, Event, IllegalTransition, State

ENDS = {
    Action.LIST: {Event.INDEXES_MISSING, Event.INDEXES_COMPLETE, Event.FOUND_COMMIT, Event.FOUND_ABORT, Event.GIVE_UP},
    Action.CHECK: {Event.COVERED, Event.GIVE_UP},
    Action.CLAIM_COMMIT: {Event.WON, Event.LOST, Event.CLAIM_FAILED, Event.CLAIM_UNKNOWN},
    Action.CLAIM_ABORT: {Event.WON, Event.LOST, Event.CLAIM_FAILED, Event.CLAIM_UNKNOWN},
    Action.AWAIT_RECORD: {Event.RECORD_MISSING, Event.FOUND_COMMIT, Event.FOUND_ABORT, Event.GIVE_UP},
    Action.READ_RECORD: {Event.FOUND_COMMIT, Event.FOUND_ABORT, Event.STORAGE_FAILED},
    Action.PUBLISH: {Event.PUBLISHED, Event.STORAGE_FAILED},
    Action.FINISH: set(),
}


@pytest.mark.parametrize(("rank", "role"), [(0, "committer"), (1, "peer"), (7, "peer")])
def test_every_state_and_event(rank: int, role: str) -> None:
    for state, event in product(State, Event):
        machine = CommitMachine(rank)
        assert machine.role == role
        machine.state = state
        row = TRANSITIONS[role].get((state, event))
        if row is None:
            with pytest.raises(IllegalTransition, match=f"{event.name} cannot happen to a {role} that is {state.name}"):
                machine.on(event)
            assert machine.state is state
        else:
            assert machine.on(event) is row[1] and machine.state is row[0]
            assert (row[1] is Action.FINISH) == (row[0] in FINAL)
        assert row is None or state not in FINAL


@pytest.mark.parametrize("role", ["committer", "peer"])
def test_every_way_an_action_ends_is_in_the_table(role: str) -> None:
    """Walks all that can be reached; and nothing is in the table that cannot be."""
    reached, ways = {(State.WRITING, event) for event in (Event.PREPARED, Event.GIVE_UP)}, set()
    todo = list(reached)
    while todo:
        key = todo.pop()
        ways.add(key)
        state, action = TRANSITIONS[role][key]
        following = {(state, event) for event in ENDS[action]}
        todo += following - reached
        reached |= following
    assert ways == set(TRANSITIONS[role])


def test_only_the_committer_commits_and_only_after_the_check() -> None:
    for role, rows in TRANSITIONS.items():
        for (state, event), (_, action) in rows.items():
            if action is Action.CLAIM_COMMIT:
                assert (role, state, event) == ("committer", State.CHECKING, Event.COVERED)
