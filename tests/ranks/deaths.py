"""What the processes of ``world.py`` do in the end: they die in the middle of saves, or what works for them does."""

from __future__ import annotations

import os
import select
import signal
import time
import traceback
from typing import Any

import torch
import torch.distributed as dist

from asyncdcp import AsyncCheckpointer, Options, PerRank
from asyncdcp.errors import DeadlineExceeded, PeerFailed, WorkerCrashed
from asyncdcp.format.blocks import SLAB_BYTES
from asyncdcp.storage.faults import FaultyStorage
from asyncdcp.storage.spec import Fault
from asyncdcp.worker.protocol import Leave
from tests.ranks.meshes import WORLD, World


def dying(world: World) -> dict[str, str]:
    """A background process is killed in the middle of a save of four ranks, then a trainer; three ranks go on. The
    failures that this rank has seen.
    """
    found: dict[str, str] = {}
    options = Options(agreement_deadline=30, save_deadline=30, load_deadline=30, staging_bytes=SLAB_BYTES)
    four = AsyncCheckpointer(options, process=True, process_group=dist.group.WORLD)
    scenes = {"a background process": a_worker_dies, "one that sleeps": a_worker_sleeps, "a trainer": a_trainer_dies}
    for name, scene in scenes.items():
        try:
            scene(world, four)
        except Exception:  # noqa: BLE001  # the test shows it
            found[name] = traceback.format_exc()
    four.close()
    return found


def doomed_state(world: World, version: int) -> dict[str, Any]:
    """Of the last rank so much that it is not staged before something is written."""
    slabs = 4 if world.rank == WORLD - 1 else 0
    big = torch.full((slabs * SLAB_BYTES // 4 + 1,), float(version))
    return {"x": torch.full((8,), float(version)), "own": PerRank(big)}


def check_version(world: World, version: int) -> None:
    loaded = world.alone.load(world.folder / "dying", per_rank="drop").result()
    assert loaded["x"].tolist() == [version] * 8, loaded


def doomed_save(world: World, four: AsyncCheckpointer, version: int, victim: int, fault: Fault) -> BaseException | None:
    """A save that ``fault`` befalls on one rank. Its error, which must come before the deadline."""
    path = world.folder / "dying"
    where = FaultyStorage(path, [fault]) if world.rank == victim else path
    begun = time.monotonic()
    error = four.save(where, doomed_state(world, version), overwrite=True).exception()
    assert time.monotonic() - begun < 25
    return error


def a_worker_dies(world: World, four: AsyncCheckpointer) -> None:
    """It is rank 2's. The trainers go on, and so do their next saves."""
    four.save(world.folder / "dying", doomed_state(world, 1)).result()
    error = doomed_save(world, four, 2, 2, Fault("pwrite", 1, "kill"))
    if world.rank == 2:
        assert isinstance(error, WorkerCrashed) and error.signal == signal.SIGKILL, error
    else:
        assert isinstance(error, PeerFailed) and error.rank == 2, error
    check_version(world, 1)
    dist.barrier()
    four.save(world.folder / "dying", doomed_state(world, 3), overwrite=True).result()
    check_version(world, 3)


def a_worker_sleeps(world: World, four: AsyncCheckpointer) -> None:
    """Rank 1's, in an uninterruptible wait: SIGKILL does nothing to it. It wakes when the job was started again, and
    has saved to the same place.
    """
    options = Options(agreement_deadline=30, save_deadline=9, settle_seconds=5)
    with AsyncCheckpointer(options, process=True, process_group=dist.group.WORLD) as old:
        old.prepare(doomed_state(world, 4)).result()
        process = old._lanes.pipeline.process  # type: ignore[attr-defined]  # it has one
        kill, process._send_kill = process._send_kill, lambda: None
        error = doomed_save(world, old, 4, 1, Fault("pwrite", 1, "stop"))
        if world.rank == 1:
            assert isinstance(error, DeadlineExceeded), error
        else:
            assert isinstance(error, PeerFailed) and error.rank == 1, error
        check_version(world, 3)
        dist.barrier()
        four.save(world.folder / "dying", doomed_state(world, 5), overwrite=True).result()
        dist.barrier()
        process._send_kill = kill
        if world.rank == 1:
            woken = os.pidfd_open(process.pid)
            os.kill(process.pid, signal.SIGCONT)
            old._engine.call(process.post, Leave())  # it exits once it has settled the save in its own eyes
            assert select.select([woken], [], [], 20)[0]
            os.close(woken)
    dist.barrier()
    check_version(world, 5)


def a_trainer_dies(world: World, four: AsyncCheckpointer) -> None:
    """It is the last rank's, while it stages. The others are told by its background process, and go on as a new job
    that saves to the same place.
    """
    error = doomed_save(world, four, 6, WORLD - 1, Fault("pwrite", 1, "kill-trainer"))
    assert isinstance(error, PeerFailed) and error.rank == WORLD - 1, error
    check_version(world, 5)
    options = Options(agreement_deadline=20, save_deadline=20)
    with AsyncCheckpointer(options, process=True, process_group=world.groups[WORLD - 1]) as restarted:
        restarted.save(world.folder / "dying", doomed_state(world, 7), overwrite=True).result()
    check_version(world, 7)


def die_after_staging(world: World) -> None:
    """Every trainer that is left is killed once its part is staged; what becomes of the save, the background processes
    see to.
    """
    group = world.groups[WORLD - 1]
    checkpointer = AsyncCheckpointer(Options(agreement_deadline=20), process=True, process_group=group)
    state = {"x": torch.full((3,), 4.0), "own": PerRank(world.rank)}
    staged, _ = checkpointer.save(world.folder / "orphaned", state)
    staged.result(60)
    dist.barrier(group)
    os.kill(os.getpid(), signal.SIGKILL)
