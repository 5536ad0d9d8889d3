"""Four gloo processes that run every case in turn and write down what came of it. Started by ``test_world.py``.

python -m tests.ranks.world PORT FOLDER
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.ranks.deaths import die_after_staging, dying
from tests.ranks.meshes import WORLD, World, cases

_PR_SET_PDEATHSIG = 1


def one_rank(rank: int, port: str, folder: Path) -> None:
    """The life of one process, which does not return."""
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=40)
    )
    world = World(rank, folder)
    outcomes = {}
    for name, case in cases().items():
        dist.barrier()
        try:
            case(world)
        except Exception:  # noqa: BLE001  # the test shows it
            outcomes[name] = traceback.format_exc()
    (folder / f"outcomes-{rank}.json").write_text(json.dumps(outcomes))
    outcomes |= dying(world)
    (folder / f"outcomes-{rank}.json").write_text(json.dumps(outcomes))
    for checkpointer in world.checkpointers.values():
        checkpointer.close()
    die_after_staging(world)


def main(port: str, folder: Path) -> None:
    """Forks the ranks: that torch is imported once, and not by each of them, is half of what a world costs. How each
    ended is in ``codes.json``.
    """
    torch.set_num_threads(1)
    assert len(os.listdir("/proc/self/task")) == 1, "what is forked must have one thread"
    children = [_forked(rank, port, folder) for rank in range(WORLD)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (folder / "codes.json").write_text(json.dumps(codes))


def _forked(rank: int, port: str, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a test that gives up kills the parent alone
    log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        one_rank(rank, port, folder)
    except BaseException:  # noqa: BLE001  # no code of the parent's is to run here
        traceback.print_exc()
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
