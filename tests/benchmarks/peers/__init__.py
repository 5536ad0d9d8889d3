"""The ways to save and load that take turns with asyncdcp, each as its documentation recommends on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from tests.benchmarks.peers.dcp import DCPAsyncProcess, DCPAsyncThread, DCPSave, Experimental
from tests.benchmarks.peers.files import SafeTensors, TorchSave
from tests.benchmarks.peers.others import TorchCheckpointing, TorchSnapshot
from tests.benchmarks.peers.own import OwnProcess, OwnThread
from tests.benchmarks.peers.peer import Peer

OWN: Sequence[type[Peer]] = (OwnProcess, OwnThread)
OTHERS: Sequence[type[Peer]] = (
    TorchSave,
    SafeTensors,
    DCPSave,
    DCPAsyncThread,
    DCPAsyncProcess,
    Experimental,
    TorchSnapshot,
    TorchCheckpointing,
)


def peers_by_name(names: Sequence[str] | None) -> list[type[Peer]]:
    """Those named, or all that are installed. Raises ValueError for a name that there is not, and says which are."""
    installed = [peer for peer in OTHERS if find_spec(peer.needs) is not None]
    if names is None:
        return installed
    unknown = sorted(set(names) - {peer.key for peer in OTHERS})
    if unknown:
        raise ValueError(f"no peer {', '.join(unknown)}; there are {', '.join(peer.key for peer in OTHERS)}")
    missing = [f"{peer.key} ({peer.needs})" for peer in OTHERS if peer.key in names and peer not in installed]
    if missing:
        raise ValueError(f"not installed: {', '.join(missing)}; pip install asyncdcp[bench]")
    return [peer for peer in installed if peer.key in names]


def opened_all(kinds: Sequence[type[Peer]], source: Any, target: Any) -> list[Peer]:
    """A peer of each kind, over the same tensors."""
    return [kind(source, target) for kind in kinds]
