"""What a save holds in memory beyond the state."""

from __future__ import annotations

from collections.abc import Sequence

from tests.benchmarks.child import RING_BYTES, Ring, ask
from tests.benchmarks.measuring import Setting, place
from tests.benchmarks.peers import OWN
from tests.benchmarks.peers.peer import Peer
from tests.benchmarks.results import Budget, Results
from tests.benchmarks.states import SHAPES, bytes_of, gpt2_adam

MIB = 1 << 20


def run(setting: Setting) -> Results:
    """Each in a process of its own, the most of three saves; once, since it hardly varies."""
    size = bytes_of(gpt2_adam(SHAPES[setting.size]))
    about = f"the most that processes held beyond the state of {size / 1e9:.2f} GB, during three saves"
    results = Results("memory", about, unit="GB", scale=1e-9)
    kinds: Sequence[type[Peer]] = (*OWN, Ring, *setting.peers)
    for kind in kinds:
        setting.progress(f"memory: {kind.name}")
        with place(setting) as folder:
            folder.mkdir()
            answer = ask("memory", kind, setting.size, folder)
        results.add(kind.name, beyond=answer["extra"])
        results.notes.append(f"{kind.name}: {answer['extra'] / size:.3f} x the state")
    results.budgets = [Budget(kind.name, "beyond", 1.05 * size + 64 * MIB) for kind in OWN]
    results.budgets.append(Budget(Ring.name, "beyond", RING_BYTES + 128 * MIB))
    return results
