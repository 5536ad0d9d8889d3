"""How late the ticks of the trainer's own event loop come while a save goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.benchmarks.measuring import Setting, place, turns
from tests.benchmarks.peers import OWN
from tests.benchmarks.peers.peer import Peer
from tests.benchmarks.results import Budget, Results
from tests.benchmarks.states import SHAPES, bytes_of, gpt2_adam

_TICK: Final = 0.001
_BUDGETS: Final = {"p99": 0.008, "p100": 0.025}


def run(setting: Setting) -> Results:
    """Every peer is begun on the loop, as a trainer on asyncio would, and polled there."""
    source = gpt2_adam(SHAPES[setting.size])
    about = f"lag of the trainer's event loop during a save; {bytes_of(source) / 1e9:.2f} GB"
    results = Results("lag", about, unit="ms", scale=1000)
    results.order(kind.name for kind in (*OWN, *setting.peers))
    peers = [kind(source, source) for kind in (*OWN, *setting.peers)]
    try:
        for number, peer in turns(setting, "lag", peers, lambda peer: peer.name):
            with place(setting) as folder:
                late = asyncio.run(_lags(peer, folder))
                peer.finish()
            if number:
                results.add(peer.name, p50=_percentile(late, 50), p99=_percentile(late, 99), p100=max(late))
    finally:
        for peer in peers:
            peer.close()
    results.budgets = [Budget(OWN[0].name, metric, most) for metric, most in _BUDGETS.items()]
    return results


async def _lags(peer: Peer, folder: Path) -> list[float]:
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + _TICK
            await asyncio.sleep(_TICK)
            late.append(time.perf_counter() - due)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.02)
    late.clear()
    if peer.runs_a_loop:
        await asyncio.to_thread(peer.begin, folder)
    else:
        peer.begin(folder)
    while not peer.done():  # noqa: ASYNC110  # a peer has no event to wait for
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.005)  # so that a tick that was kept waiting is counted
    ticking.cancel()
    return late


def _percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[min(len(values) * percent // 100, len(values) - 1)]
