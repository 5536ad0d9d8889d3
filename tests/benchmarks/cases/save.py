"""Stall, staging, time until durable, and processor time of one save of an idle trainer."""

from __future__ import annotations

import time

from tests.benchmarks.limits import Limits
from tests.benchmarks.measuring import Setting, background_cpu, own_cpu, place, timed, turns
from tests.benchmarks.peers import OWN
from tests.benchmarks.peers.peer import Peer
from tests.benchmarks.results import Ratio, Results
from tests.benchmarks.states import SHAPES, bytes_of, gpt2_adam, tensors_of


def run(setting: Setting) -> Results:
    """``call`` is how long ``save()`` takes, ``stall`` how long until the tensors may be changed."""
    source = gpt2_adam(SHAPES[setting.size])
    about = f"one save, nothing else running; {bytes_of(source) / 1e9:.2f} GB in {len(tensors_of(source))} tensors"
    results = Results("save", about, ratios=ratios(setting))
    limits = Limits(source)
    peers = [kind(source, source) for kind in (*OWN, *setting.peers)]
    subjects: list[Peer | Limits] = [*peers, limits]
    results.order(subject.name for subject in subjects)
    try:
        for number, subject in turns(setting, "save", subjects, lambda subject: subject.name):
            values = _limits(setting, limits) if isinstance(subject, Limits) else _save(setting, subject)
            if number:
                results.add(subject.name, **values)
    finally:
        for subject in subjects:
            subject.close()
    return results


def _save(setting: Setting, peer: Peer) -> dict[str, float]:
    with place(setting) as folder:
        own, background, begun = own_cpu(), background_cpu(), time.perf_counter()
        peer.begin(folder)
        called = time.perf_counter()
        peer.staged()
        staged = time.perf_counter()
        peer.finish()
        return {
            "call": called - begun,
            "stall": staged - begun,
            "durable": time.perf_counter() - begun,
            "trainer_CPU": own_cpu() - own,
            "background_CPU": max(background_cpu() - background, 0.0),
        }


def _limits(setting: Setting, limits: Limits) -> dict[str, float]:
    with place(setting) as folder:
        own = own_cpu()
        copied = timed(limits.copy)
        written = timed(lambda: limits.write(folder))
        return {"stall": copied, "durable": written, "trainer_CPU": own_cpu() - own}


def ratios(setting: Setting) -> list[Ratio]:
    """Against the machine's limits with the budgets, and against each peer."""
    own, limits = OWN[0].name, Limits.name
    found = [
        Ratio("stall / memcpy", own, "stall", limits, "stall", 1.15),
        Ratio("stall / memcpy, thread", OWN[1].name, "stall", limits, "stall", 1.15),
        Ratio("durable / raw write + fsync", own, "durable", limits, "durable", 1.25),
        Ratio("durable / raw write + fsync, thread", OWN[1].name, "durable", limits, "durable", 1.25),
    ]
    for peer in setting.peers:
        found += [Ratio(f"{metric} / {peer.name}", own, metric, peer.name, metric) for metric in ("stall", "durable")]
    return found
