"""Many small tensors: what each costs, not what its bytes cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from asyncdcp import AsyncCheckpointer
from tests.benchmarks.measuring import Setting, clear, place, timed, turns
from tests.benchmarks.peers import OWN
from tests.benchmarks.peers.own import OwnProcess
from tests.benchmarks.peers.peer import Peer
from tests.benchmarks.results import Budget, Results
from tests.benchmarks.states import many_small

COUNTS: Final = {"gpt2": (20_000, 100_000), "small": (2_000, 20_000), "tiny": (50, 100)}
_SLOW: Final = {"dcp", "dcp-thread", "dcp-process", "torchsnapshot"}
"""Some seconds for 20,000 tensors: measured with those, not with more."""
_A_DESCRIPTOR_EACH: Final = {"dcp-process", "experimental", "torch_checkpointing"}
"""They share each tensor by a file of its own: more than a process may have open."""

_DESCRIPTORS: Final = 10_000


class OwnNew(OwnProcess):
    """Every turn is the first save and the first load of the structure; the process and its memory are there."""

    key: ClassVar[str] = "new"
    name: ClassVar[str] = "asyncdcp, structure new"

    def begin(self, folder: Path) -> None:
        fresh = AsyncCheckpointer(process=self.process)
        fresh.prepare({"x": next(iter(self._source.values()))}).result()
        self._checkpointer.close()
        self._checkpointer = fresh
        super().begin(folder)


def run(setting: Setting) -> Results:
    """1 KiB each, 20,000 and 100,000 of them; fewer for a size that is to be quick."""
    counts = COUNTS[setting.size]
    about = f"{' and '.join(f'{count:,}' for count in counts)} tensors of 1 KiB"
    results = Results("small", about, unit="ms", scale=1000)
    for count in counts:
        source, target = many_small(count), many_small(count)
        left_out = (_SLOW if count > 20_000 else set()) | (_A_DESCRIPTOR_EACH if count > _DESCRIPTORS else set())
        kinds = [kind for kind in setting.peers if kind.key not in left_out]
        peers = [kind(source, target) for kind in (OWN[0], OwnNew, *kinds)]
        try:
            _measure(setting, results, peers, target)
        finally:
            for peer in peers:
                peer.close()
    results.budgets = [
        Budget(f"{OWN[0].name}, 20,000", "save", 0.5),
        Budget(f"{OWN[0].name}, 20,000", "load", 0.3),
        Budget(f"{OwnNew.name}, 20,000", "save", 0.9),
        Budget(f"{OwnNew.name}, 20,000", "load", 0.6),
    ]
    return results


def _measure(setting: Setting, results: Results, peers: Sequence[Peer], target: dict[str, Any]) -> None:
    for number, peer in turns(setting, f"small, {len(target):,}", peers, lambda peer: peer.name):
        with place(setting) as folder:
            begun = timed(lambda: peer.begin(folder))  # noqa: B023  # called at once
            saved = begun + timed(peer.staged) + timed(peer.finish)
            clear(target)
            loaded = timed(lambda: peer.load(folder))  # noqa: B023  # called at once
        if number:
            results.add(f"{peer.name}, {len(target):,}", save=saved, load=loaded)
