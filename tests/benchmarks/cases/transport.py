"""Live state from one process to one and to three others, beside torch's PGTransport and the raw group."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Final

from tests.benchmarks.measuring import Setting
from tests.benchmarks.results import Budget, Ratio, Results
from tests.benchmarks.transfer import (
    BY_GROUP,
    BY_GROUP_UNVERIFIED,
    OWN,
    SMALL_TENSORS,
    UNVERIFIED,
    Raw,
    Samples,
    Torch,
)

RECEIVERS: Final = (1, 3)


def run(setting: Setting) -> Results:
    """A world of its own for each number of receivers; every subject in turn in each."""
    about = f"1 to 1 and 1 to 3 on gloo, in place; small: {SMALL_TENSORS[setting.size]} tensors of 1 KiB"
    results = Results("transport", about)
    for receivers in RECEIVERS:
        setting.progress(f"transport: 1 to {receivers}, {setting.rounds} rounds")
        for subject, metrics in measured(setting, receivers).items():
            name = _name(subject, receivers)
            for values in zip(*metrics.values(), strict=True):
                results.add(name, **dict(zip(metrics, values, strict=True)))
        own, grouped, raw, torch = (_name(subject, receivers) for subject in (OWN, BY_GROUP, Raw.name, Torch.name))
        bare = _name(BY_GROUP_UNVERIFIED, receivers)
        results.ratios += [
            Ratio(f"1 to {receivers}, unverified / torch", _name(UNVERIFIED, receivers), "big", torch, "big", 1.0),
            Ratio(f"1 to {receivers}, verified / torch", own, "big", torch, "big", 1 / 0.9),
            Ratio(f"1 to {receivers}, verified / raw", own, "big", raw, "big", 1 / 0.9),
            Ratio(f"1 to {receivers}, by the group, unverified / torch", bare, "big", torch, "big", 1.0),
            Ratio(f"1 to {receivers}, by the group, verified / torch", grouped, "big", torch, "big", 1 / 0.9),
            Ratio(f"1 to {receivers}, small / torch", own, "small", torch, "small", 0.2),
            Ratio(f"1 to {receivers}, by the group, small / torch", grouped, "small", torch, "small", 0.2),
        ]
        results.budgets += [Budget(own, "lag p99", 0.008), Budget(grouped, "lag p99", 0.008)]
    results.notes.append("a structure is sent again, after a first round; lag and memory are of turns of their own")
    results.notes.append("memory is in GB, beyond what the processes held before; the bound is 0.067")
    return results


def measured(setting: Setting, receivers: int) -> Samples:
    """Seconds, but for memory, in GB. Raises RuntimeError with what the processes said, if they fail."""
    program = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.transfer"]
    done = subprocess.run(
        [*program, setting.size, str(receivers), str(setting.rounds)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(program)} failed:\n{done.stderr[-2000:]}")
    found: Samples = json.loads(done.stdout.splitlines()[-1])
    for metrics in found.values():
        metrics["memory"] = [value / 1e9 for value in metrics["memory"]]
    return found


def _name(subject: str, receivers: int) -> str:
    return f"{subject}, 1 to {receivers}"
