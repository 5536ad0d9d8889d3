"""What a checkpoint costs a trainer that computes on all cores and changes its weights in every step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tests.benchmarks.measuring import Setting, place, turns
from tests.benchmarks.peers import OWN
from tests.benchmarks.peers.peer import Peer
from tests.benchmarks.results import Ratio, Results, interval
from tests.benchmarks.states import SHAPES, bytes_of, gpt2_adam, tensors_of

_PRODUCTS: Final = 8
_FIRST_STEPS: Final = 10
_MOST_STEPS: Final = 4000
_CURVE: Final = 160


class Training:
    """Steps of a fixed amount of work: matrix products, then a change of some of the weights, in turn."""

    def __init__(self, state: Any, side: int) -> None:
        self._a, self._b = torch.randn(side, side), torch.randn(side, side)
        self._weights: list[Tensor] = [tensor for tensor in tensors_of(state).values() if tensor.dim()]
        self._next = 0

    def step(self, before_update: Callable[[], object] = lambda: None) -> None:
        """About 20 ms on two cores, of matrices of 768."""
        for _ in range(_PRODUCTS):
            torch.mm(self._a, self._b)
        before_update()
        for _ in range(min(8, len(self._weights))):
            self._weights[self._next % len(self._weights)].add_(1e-6)
            self._next += 1


def run(setting: Setting) -> Results:
    """A sample: the time of all steps from a save's begin until it is durable, less that of as many steps right before
    without a save. Before the first change of a weight the trainer waits for ``staged``, as each peer has it.
    """
    source = gpt2_adam(SHAPES[setting.size])
    about = f"training time lost per checkpoint, {setting.saves} checkpoints, {bytes_of(source) / 1e9:.2f} GB"
    results = Results("train", about, unit="ms", scale=1000)
    training = Training(source, 64 if setting.size == "tiny" else 768)
    peers = [kind(source, source) for kind in (*OWN, *setting.peers)]
    every = replace(setting, rounds=setting.saves)
    results.order(peer.name for peer in peers)
    lengths: dict[str, int] = {}
    try:
        for number, peer in turns(every, "train", peers, lambda peer: peer.name):
            alone = _steps(training, lengths.get(peer.name, _FIRST_STEPS))
            with place(setting) as folder:
                seconds = _steps_with(training, peer, folder)
                peer.finish()  # what is left of it (the sync, of a peer that leaves that to others) costs no step
            lengths[peer.name] = len(seconds)
            if number:
                each = sum(alone) / len(alone)
                results.add(peer.name, lost=sum(seconds) - each * len(seconds), durable=sum(seconds))
            if number == 1:
                before = alone[-_CURVE // 8 :]
                results.series[peer.name] = list(enumerate(before + seconds[:_CURVE], start=-len(before)))
    finally:
        for peer in peers:
            peer.close()
    _conclude(results, setting)
    return results


def _steps(training: Training, count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        begun = time.perf_counter()
        training.step()
        seconds.append(time.perf_counter() - begun)
    return seconds


def _steps_with(training: Training, peer: Peer, folder: Path) -> list[float]:
    """A save, and the steps until it is durable; at least one."""
    seconds: list[float] = []
    while not seconds or (not peer.done() and len(seconds) < _MOST_STEPS):
        begun = time.perf_counter()
        if seconds:
            training.step()
        else:
            peer.begin(folder)
            training.step(peer.staged)
        seconds.append(time.perf_counter() - begun)
    return seconds


def _conclude(results: Results, setting: Setting) -> None:
    own = OWN[0].name
    for name, metrics in results.samples.items():
        low, high = interval(metrics["lost"])
        results.notes.append(f"{name}: 95 % of the median lost {1000 * low:.0f} to {1000 * high:.0f} ms")
    for peer in setting.peers:
        results.ratios.append(Ratio(f"lost / {peer.name}", own, "lost", peer.name, "lost"))
    others = [peer.name for peer in setting.peers if peer.name in results.samples]
    if others:
        best = min(others, key=lambda name: statistics.median(results.samples[name]["lost"]))
        results.ratios.append(Ratio(f"lost / best peer ({best})", own, "lost", best, "lost", 0.2))
