"""Power is lost after every call of every workload of up to three steps, and what may be left is loaded."""

from __future__ import annotations

import pytest

from tests.reliability.power import Figures, explore, workloads
from tests.reliability.worlds import PLACE, Lost, Seen, World, check


@pytest.mark.parametrize(("ranks", "steps"), [(1, 3), (2, 3)])
def test_nothing_acknowledged_is_lost(ranks: int, steps: int) -> None:
    seen = Seen()
    figures = Figures()
    for workload in workloads(steps):
        explore(workload, ranks=ranks, limit=40, seen=seen, figures=figures)
    assert figures["states"] > 200


def test_a_process_killed_at_every_call_then_power_lost() -> None:
    """Also of what it made and did not come to sync, and of a save by the next process over that."""
    seen = Seen()
    for calls in range(1, 36):
        explore(("save", f"killed after {calls}", "resume", "save"), limit=6, seen=seen)


async def test_the_oracle_sees_a_loss() -> None:
    """What was acknowledged and is not there, what is half there, and a version that was never saved."""
    world = World(limit=5)
    await world.save()
    world.lose_power("the end", "/")
    good = world.losses[-1]
    await check(good)
    data = next(path for path in good.image if path.endswith(".safetensors"))
    losses: list[dict[str, bytes | None]] = [{PLACE: None}, {**good.image, data: b"x"}]
    for image in losses:
        with pytest.raises(Lost, match="found version 0"):
            await check(good._replace(image=image))
    with pytest.raises(Lost, match="found version 1"):
        await check(good._replace(expected=frozenset({2})))
