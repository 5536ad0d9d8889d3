"""Loading in place, every byte checked: with a cold page cache, and with a warm one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.benchmarks.limits import Limits
from tests.benchmarks.measuring import (
    Setting,
    bring_into_cache,
    check_equal,
    clear,
    drop_from_cache,
    place,
    timed,
    turns,
)
from tests.benchmarks.peers import OWN
from tests.benchmarks.peers.files import SafeTensors
from tests.benchmarks.peers.peer import Peer
from tests.benchmarks.results import Ratio, Results
from tests.benchmarks.states import SHAPES, bytes_of, gpt2_adam


def run(setting: Setting) -> Results:
    """Each turn saves, loads cold, and loads warm."""
    source, target = gpt2_adam(SHAPES[setting.size]), gpt2_adam(SHAPES[setting.size])
    about = f"in place, {bytes_of(source) / 1e9:.2f} GB; asyncdcp verifies every byte, the others do not"
    results = Results("load", about, ratios=_ratios(setting))
    limits = Limits(source)
    kinds = [OWN[0], *setting.peers]
    if SafeTensors not in kinds:
        kinds.append(SafeTensors)  # the budget of the warm load is in terms of it
    subjects: list[Peer | Limits] = [*(kind(source, target) for kind in kinds), limits]
    results.order(subject.name for subject in subjects)
    try:
        for number, subject in turns(setting, "load", subjects, lambda subject: subject.name):
            with place(setting) as folder:
                if isinstance(subject, Limits):
                    subject.write(folder)
                    loads = {True: partial(subject.read, folder, direct=False)}
                    loads[False] = partial(subject.read, folder, direct=True)
                else:
                    _save(subject, folder)
                    loads = dict.fromkeys((True, False), partial(subject.load, folder))
                    clear(target)
                drop_from_cache(folder)
                cold = timed(loads[False])
                if not number and not isinstance(subject, Limits):
                    check_equal(source, target, subject.name)
                bring_into_cache(folder)
                warm = timed(loads[True])
            if number:
                results.add(subject.name, cold=cold, warm=warm)
    finally:
        for subject in subjects:
            subject.close()
    return results


def _save(peer: Peer, folder: Path) -> None:
    peer.begin(folder)
    peer.staged()
    peer.finish()


def _ratios(setting: Setting) -> list[Ratio]:
    own = OWN[0].name
    found = [
        Ratio("cold / raw O_DIRECT read", own, "cold", Limits.name, "cold", 1.25),
        Ratio("warm / safetensors", own, "warm", SafeTensors.name, "warm", 1.3),
        Ratio("warm / raw cached read", own, "warm", Limits.name, "warm"),
    ]
    for peer in setting.peers:
        found += [Ratio(f"{metric} / {peer.name}", own, metric, peer.name, metric) for metric in ("cold", "warm")]
    return found
