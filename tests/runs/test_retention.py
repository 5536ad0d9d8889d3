"""What the policies keep, and what none of them can make go."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdcp.errors import InvalidOption
from asyncdcp.runs import AllOf, AnyOf, Checkpoint, KeepBest, KeepEvery, KeepLast, Retention, to_delete


def made(step: int, loss: float | None = None, state: Any = "committed", *, on_line: bool = True) -> Checkpoint:
    metrics: dict[str, float | None] = {} if loss is None else {"loss": loss}
    return Checkpoint(name=f"step_{step}", step=step, state=state, on_line=on_line, save_id="0" * 20, metrics=metrics)


RUN = [made(step, loss) for step, loss in ((100, 5.0), (150, 1.0), (200, 3.0), (250, None), (300, 2.0), (350, 4.0))]


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (KeepLast(2), [300, 350]),
        (KeepLast(99), [100, 150, 200, 250, 300, 350]),
        (KeepBest("loss", 2), [150, 300, 350]),
        (KeepBest("loss", mode="max"), [100, 350]),
        (KeepBest("accuracy"), [350]),
        (KeepEvery(100), [100, 200, 300, 350]),
        (KeepLast(2) | KeepEvery(100), [100, 200, 300, 350]),
        (KeepBest("loss", 4) & KeepEvery(100), [200, 300, 350]),
        (AnyOf(KeepLast(1), KeepBest("loss"), KeepEvery(200)), [150, 200, 350]),
        (AllOf(KeepLast(3)), [250, 300, 350]),
    ],
    ids=repr,
)
def test_what_is_kept(policy: Retention, kept: list[int]) -> None:
    gone = [checkpoint.step for checkpoint in to_delete(policy, RUN)]
    assert sorted({each.step for each in RUN} - set(gone)) == kept
    assert gone == sorted(gone)


class KeepNothing:
    def keeps(self, checkpoints: object) -> set[int]:
        return set()


_checkpoint = st.builds(
    made,
    st.integers(0, 50),
    st.none() | st.floats(0, 9),
    st.sampled_from(["committed", "committed", "partial", "aborted", "damaged"]),
    on_line=st.booleans(),
)
_policy = st.sampled_from([KeepNothing(), KeepLast(1), KeepBest("loss"), KeepEvery(7) & KeepLast(2)])


@given(st.lists(_checkpoint), _policy)
def test_the_newest_good_one_always_stays_and_nothing_else_is_touched(run: list[Checkpoint], policy: Retention) -> None:
    gone = to_delete(policy, run)
    good = [checkpoint for checkpoint in run if checkpoint.good]
    assert all(checkpoint.good for checkpoint in gone)
    if good:
        newest = max(checkpoint.step for checkpoint in good)
        assert newest not in [checkpoint.step for checkpoint in gone]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: KeepLast(0),
        lambda: KeepLast(True),
        lambda: KeepBest("loss", 1, "least"),  # type: ignore[arg-type]  # on purpose
        lambda: KeepBest(2),  # type: ignore[arg-type]  # on purpose
        lambda: KeepEvery(-5),
        lambda: AnyOf(),
        lambda: AllOf(KeepLast(1), 3),  # type: ignore[arg-type]  # on purpose
        lambda: AnyOf(KeepLast),  # type: ignore[arg-type]  # on purpose
    ],
)
def test_what_means_nothing_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidOption):
        wrong()
