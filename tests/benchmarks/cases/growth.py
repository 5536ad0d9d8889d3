"""Cost against size: per byte and per tensor it has to stay flat."""

from __future__ import annotations

from typing import Any, Final

import torch

from tests.benchmarks.measuring import Setting, place, timed, turns
from tests.benchmarks.peers import OWN
from tests.benchmarks.results import Ratio, Results
from tests.benchmarks.states import many_small

_SIZES: Final = {"gpt2": 96 << 20, "small": 16 << 20, "tiny": 1 << 20}
_TENSORS: Final = {"gpt2": 1000, "small": 100, "tiny": 10}
BYTES_STEPS: Final = (1, 4, 16)
TENSOR_STEPS: Final = (1, 10, 100)


def run(setting: Setting) -> Results:
    """Bytes × 1, × 4, × 16 in 64 tensors; tensors × 1, × 10, × 100 of 1 KiB. A structure's plan is there already."""
    size, tensors = _SIZES[setting.size], _TENSORS[setting.size]
    results = Results("growth", f"{size >> 20} MiB x 1, 4, 16; {tensors:,} tensors x 1, 10, 100; asyncdcp alone")
    results.unit, results.scale = "ns per byte, µs per tensor", 1.0
    for step in BYTES_STEPS:
        state = {str(number): torch.rand(size * step // 64 // 4) for number in range(64)}
        _measure(setting, results, f"bytes x {step}", state, 1e9 / (size * step))
    for step in TENSOR_STEPS:
        _measure(setting, results, f"tensors x {step}", many_small(tensors * step), 1e6 / (tensors * step))
    for kind, steps in (("bytes", BYTES_STEPS), ("tensors", TENSOR_STEPS)):
        for metric in ("save", "load"):
            last, before = f"{kind} x {steps[-1]}", f"{kind} x {steps[-2]}"
            results.ratios.append(Ratio(f"{metric}: {last} / {before}", last, metric, before, metric, 1.25))
            points = [(float(step), _middle(results.samples[f"{kind} x {step}"][metric])) for step in steps]
            results.series[f"{metric}, per {kind[:-1]}"] = points
    return results


def _measure(setting: Setting, results: Results, name: str, state: dict[str, Any], per: float) -> None:
    target = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    peer = OWN[0](state, target)
    try:
        for number, _ in turns(setting, f"growth, {name}", [peer], lambda _: OWN[0].name):
            with place(setting) as folder:
                saved = timed(lambda: peer.begin(folder)) + timed(peer.staged) + timed(peer.finish)
                loaded = timed(lambda: peer.load(folder))  # called at once
            if number:
                results.add(name, save=saved * per, load=loaded * per)
    finally:
        peer.close()


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
