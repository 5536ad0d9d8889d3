"""One measurement that needs a process of its own; started by the cases ``memory`` and ``first``.

python -m tests.benchmarks.child memory PEER SIZE FOLDER
python -m tests.benchmarks.child first PEER SIZE FOLDER
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from asyncdcp import AsyncCheckpointer, Options
from tests.benchmarks.measuring import descendants, timed
from tests.benchmarks.peers import OTHERS, OWN
from tests.benchmarks.peers.own import OwnProcess
from tests.benchmarks.peers.peer import Peer
from tests.benchmarks.states import SHAPES, bytes_of, gpt2_adam

RING_BYTES: Final = 256 << 20
_SAVES: Final = 3


class Unprepared(OwnProcess):
    """The first save pays for everything."""

    key = "unprepared"
    name = "asyncdcp, unprepared"

    def __init__(self, source: Any, target: Any) -> None:
        self._source, self._target = source, target
        self._checkpointer = AsyncCheckpointer(process=self.process)
        self._handle = None


class Ring(OwnProcess):
    """Staging within ``RING_BYTES``."""

    key = "ring"
    name = f"asyncdcp, ring of {RING_BYTES >> 20} MiB"

    def __init__(self, source: Any, target: Any) -> None:
        self._source, self._target = source, target
        self._checkpointer = AsyncCheckpointer(Options(staging_bytes=RING_BYTES), process=self.process)
        self._checkpointer.prepare(source).result()
        self._handle = None


_ALL: Sequence[type[Peer]] = (*OWN, Unprepared, Ring, *OTHERS)
KINDS: Final = {kind.key: kind for kind in _ALL}


def ask(what: str, kind: type[Peer], size: str, folder: Path) -> dict[str, float]:
    """Runs the measurement in a new process. Raises RuntimeError with what it said, if it fails."""
    program = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.child", what, kind.key, size, str(folder)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(program)} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def memory(kind: type[Peer], state: Any, folder: Path) -> dict[str, float]:
    """The most that this process and those below it held during saves beyond what they held before, in bytes.

    Proportional set size: what processes share counts once, the page cache does not count.
    """
    before = held_bytes()
    peak = Peak()
    with peak:
        peer = kind(state, state)
        for number in range(_SAVES):
            save(peer, folder / str(number))
    peer.close()
    return {"extra": peak.bytes - before, "state": float(bytes_of(state))}


def first(kind: type[Peer], state: Any, folder: Path) -> dict[str, float]:
    """Seconds of the first save of this process, and the fewest of two later ones. What is made before the first save
    (the peer itself, ``prepare``) is not counted.
    """
    peer = kind(state, state)
    seconds = [timed(lambda number=number: save(peer, folder / str(number))) for number in range(_SAVES)]  # type: ignore[misc]  # bound at once
    peer.close()
    return {"first": seconds[0], "later": min(seconds[1:])}


def save(peer: Peer, folder: Path) -> None:
    """To the end."""
    peer.begin(folder)
    peer.staged()
    peer.finish()


def held_bytes() -> float:
    """Of this process and those below it."""
    return float(sum(_held(pid) for pid in (os.getpid(), *descendants())))


def _held(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it is gone
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


class Peak:
    """Looks again and again, on a thread, for as long as it is entered, and at the end of that."""

    def __init__(self) -> None:
        self.bytes = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        over = False
        while not over:
            over = self._over.wait(0.02)
            self.bytes = max(self.bytes, held_bytes())

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def main() -> None:
    """Prints one line of JSON."""
    what, key, size, folder = sys.argv[1:]
    measures: dict[str, Callable[[type[Peer], Any, Path], dict[str, float]]] = {"memory": memory, "first": first}
    state = gpt2_adam(SHAPES[size])
    torch.mm(torch.randn(64, 64), torch.randn(64, 64))  # the threads and buffers of a trainer are there
    gc.collect()
    time.sleep(0.1)
    print(json.dumps(measures[what](KINDS[key], state, Path(folder))))
    sys.stdout.flush()
    os._exit(0)  # some peers' processes and threads would keep this one


if __name__ == "__main__":
    main()
