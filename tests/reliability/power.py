"""Power is lost after every call of many small workloads, and everything that may be left is looked at."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence

from tests.reliability.simulation import simulated
from tests.reliability.worlds import ENDLESS, Interceptor, Lost, Seen, World, check, check_that_work_goes_on
from tests.virtual import run

STEPS = ("save", "killed", "resume", "delete")
LONGEST_SAVE = 40
"""More calls than a rank makes for a save."""


def workloads(steps: int = 3) -> Iterator[tuple[str, ...]]:
    """All of up to so many steps, that begin with a save (a whole one, or one whose process is killed)."""
    for length in range(1, steps + 1):
        for workload in itertools.product(STEPS, repeat=length):
            if workload[0] in ("save", "killed"):
                yield workload


async def perform(world: World, steps: Sequence[str], rng: random.Random) -> None:
    """Carries a workload out. Where a process is killed is ``rng``'s choice, or the step's: "killed after 5,never"."""
    for step in steps:
        match step:
            case "save":
                await world.save()
            case "resume":
                await world.resume()
            case "delete":
                await world.delete()
            case "killed":
                budgets = [rng.randrange(1, LONGEST_SAVE) for _ in range(world.ranks)]
                if rng.random() < 0.3:
                    budgets[rng.randrange(world.ranks)] = ENDLESS
                await world.try_to_save(budgets)
            case _:
                calls = step.removeprefix("killed after ").split(",")
                await world.try_to_save([ENDLESS if text == "never" else int(text) for text in calls])
        world.lose_power(f"the end of {step}", "/")


class Figures(Counter[str]):
    """What was looked at: "workloads", "calls" (points where power was lost), "states" that were left, "lost"."""


def explore(  # noqa: PLR0913  # a test's knobs
    steps: Sequence[str],
    *,
    ranks: int = 1,
    limit: int = 50,
    seed: int = 0,
    lag: float = 0.0,
    seen: Seen | None = None,
    intercept: Interceptor | None = None,
    figures: Figures | None = None,
) -> None:
    """One workload. Raises ``Lost`` for a broken promise, with what replays it."""
    seen = seen or Seen()
    rng = random.Random(f"{seed} {ranks} {' '.join(steps)}")
    figures = figures if figures is not None else Figures()

    async def main() -> None:
        world = World(ranks=ranks, limit=limit, seen=seen, intercept=intercept)
        world.lag = lag
        await perform(world, steps, rng)
        figures.update(workloads=1, calls=world.calls, states=len(world.losses))
        for number, loss in enumerate(world.losses):
            await check(loss, seen)
            if number % 20 == 0:
                await check_that_work_goes_on(loss, seen)

    try:
        with simulated(rng if seed else None):
            run(main())
    except AssertionError as error:
        raise Lost(f"seed {seed}, {ranks} ranks, {', '.join(steps)}: {error}") from error
