"""What staging costs in memory, measured by the kernel in an interpreter of its own; arenas made, grown, given back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from asyncdcp import AsyncCheckpointer, CheckpointFuture, MemoryStorage
from tests.checkpointer.conftest import wait_until

Python = Callable[..., "CompletedProcess[str]"]
MIB = 1 << 20

# A state of 400 MB of many sizes, some not contiguous; prints its MiB and the most that a save took beyond it.
MEASURE = """
    import sys, torch
    from asyncdcp import AsyncCheckpointer, Options
    from asyncdcp.format.image import DATA_ALIGNMENT

    def peak():
        with open("/proc/self/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        return int(fields["VmHWM"].split()[0]) / 1024

    state = {f"w{n}": torch.ones(16 << 20) for n in range(4)}
    state["t"] = torch.ones(4 << 10, 4 << 10).t()
    state |= {f"s{n}": torch.ones(100 + n) for n in range(500)}
    state["e"] = torch.ones(1).expand(9 << 20)
    mib = sum(tensor.nbytes for tensor in state.values()) / (1 << 20)
    with AsyncCheckpointer(Options(staging_bytes=STAGING_BYTES), process=False) as checkpointer:
        checkpointer.save("warm", {"w": torch.ones(1), "t": torch.ones(300, 300).t()}).result()
        before = peak()
        for number in range(SAVES):
            handles = [checkpointer.save(f"{number}-{i}", state) for i in range(QUEUED)]
            for handle in handles:
                handle.result()
        print(mib, peak() - before)
"""


def measure(python: Python, staging_bytes: int | None, *, saves: int = 1, queued: int = 1) -> tuple[float, float]:
    code = MEASURE.replace("STAGING_BYTES", repr(staging_bytes)).replace("SAVES", str(saves))
    ran = python(code.replace("QUEUED", str(queued)))
    assert ran.returncode == 0, ran.stderr
    mib, extra = map(float, ran.stdout.split())
    return mib, extra


def test_full_staging_takes_the_state_once(python: Python) -> None:
    mib, extra = measure(python, None)
    assert mib <= extra + 40  # else the measurement itself is wrong
    assert extra <= 1.05 * mib + 64


def test_a_ring_takes_the_ring(python: Python) -> None:
    mib, extra = measure(python, 64 * MIB, queued=2)
    assert mib > 300
    assert extra <= 64 + 128


# ── prepare, growth, and memory given back ──


Mapped = Callable[..., None]


@pytest.fixture
def mapped(uncollected: None) -> Mapped:
    """Waits until the arenas that are mapped are of these sizes, in slabs of 8 MiB. A thread that has told its result
    may have its arguments for a moment. The arenas of other tests are left out: they may go.
    """
    others = _arenas()

    def sizes() -> list[int]:
        spans = [line.split()[0].split("-") for line in _arenas() - others]
        return sorted((int(end, 16) - int(begin, 16)) // (8 * MIB) for begin, end in spans)

    def wait(*wanted: int) -> None:
        wait_until(lambda: sizes() == [*wanted])

    return wait


def _arenas() -> set[str]:
    return {line for line in Path("/proc/self/maps").read_text().splitlines() if "asyncdcp-arena" in line}


def test_prepare_makes_the_arena_and_takes_its_memory(checkpointer: AsyncCheckpointer, mapped: Mapped) -> None:
    state = {"w": torch.ones(5 * MIB)}
    checkpointer.prepare(state).result()
    arena = checkpointer._lanes.arenas._current
    assert arena is not None
    assert all(arena._prefaulted)
    mapped(3)
    checkpointer.save(MemoryStorage(), state).result()
    checkpointer.prepare(state).result()
    assert checkpointer._lanes.arenas._current is arena
    assert arena.users == 0


def test_prepare_alone_writes_nothing(checkpointer: AsyncCheckpointer, mapped: Mapped) -> None:
    checkpointer.prepare({}).result()
    checkpointer.prepare({"x": 1}).result()
    mapped(1)


def test_the_arena_grows_and_the_old_one_is_given_back(checkpointer: AsyncCheckpointer, mapped: Mapped) -> None:
    for slabs, most in ((1, 1), (3, 3), (2, 3), (4, 4)):
        checkpointer.save(MemoryStorage(), {"w": torch.ones((slabs * 2 - 1) * MIB)}).result()
        mapped(most)
    checkpointer.close()
    mapped()


def test_old_and_new_stand_side_by_side_while_the_old_is_in_use(
    checkpointer: AsyncCheckpointer, mapped: Mapped, faulty: Callable[..., MemoryStorage]
) -> None:
    storage = faulty()
    gate = storage.gate("write")  # type: ignore[attr-defined]  # the fixture's own
    first = checkpointer.save(storage, {"w": torch.ones(MIB)})
    first.staged.result()
    second = checkpointer.save(MemoryStorage(), {"w": torch.ones(5 * MIB)})
    second.staged.result()
    mapped(1, 3)
    gate.release.set()
    first.result()
    second.result()
    mapped(3)


def test_prepare_while_a_save_is_under_way_and_close_while_preparing(
    checkpointer: AsyncCheckpointer, mapped: Mapped
) -> None:
    state = {"w": torch.ones(9 * MIB)}
    futures: list[CheckpointFuture[Any]] = [
        checkpointer.prepare(state),
        checkpointer.save(MemoryStorage(), state).committed,
        checkpointer.prepare(state),
    ]
    for future in futures:
        future.result()
    checkpointer.prepare({"w": torch.ones(1).expand(40 * MIB)})
    checkpointer.close()
    mapped()
