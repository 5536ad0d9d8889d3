"""The first save of a process, which pays for memory, plans and processes, against its later ones."""

from __future__ import annotations

from collections.abc import Sequence

from tests.benchmarks.child import Unprepared, ask
from tests.benchmarks.measuring import Setting, place, turns
from tests.benchmarks.peers import OWN
from tests.benchmarks.peers.peer import Peer
from tests.benchmarks.results import Ratio, Results


def run(setting: Setting) -> Results:
    """Until durable, each in a process of its own; asyncdcp with ``prepare`` before it, and without."""
    results = Results("first", "the first save of a process until it is durable, and a later one")
    kinds: Sequence[type[Peer]] = [OWN[0], Unprepared, *setting.peers]
    results.order(kind.name for kind in kinds)
    for number, kind in turns(setting, "first", kinds, lambda kind: kind.name):
        with place(setting) as folder:
            folder.mkdir()
            answer = ask("first", kind, setting.size, folder)
        if number:
            results.add(kind.name, first=answer["first"], later=answer["later"])
    results.ratios = [
        Ratio("first / later, unprepared", Unprepared.name, "first", Unprepared.name, "later", 2.5),
        Ratio("first / later, prepared", OWN[0].name, "first", OWN[0].name, "later", 1.15),
        *(Ratio(f"first / {kind.name}", Unprepared.name, "first", kind.name, "first") for kind in setting.peers),
    ]
    return results
