"""The arena's memory, descriptors and mappings; memory limits by sample texts; the ring of slots."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import mmap
import os
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdcp import arena as arena_module
from asyncdcp.arena import Arena, SlotRing, SlotRingStatistics
from asyncdcp.errors import Closed, InvalidOption, MemoryLimit
from asyncdcp.memory_limits import (
    Headroom,
    ancestors,
    check_memory,
    parse_cgroups,
    parse_headroom,
    parse_meminfo,
    tightest,
)

MIB = 1 << 20


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena(4, 8192) as made:
        yield made


@pytest.fixture(params=["asyncio", "trio"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


_before: set[str] = set()
"""What other tests of this process have left to the garbage collector, or for good, as an abandoned arena is."""


@pytest.fixture(autouse=True)
def _apart_from_other_tests() -> None:
    gc.collect()
    _before.clear()
    _before.update(descriptors(), mappings())


def descriptors() -> set[str]:
    folder = "/proc/self/fd"
    found = set()
    for name in os.listdir(folder):
        try:
            found.add(f"{name} {os.readlink(f'{folder}/{name}')}")
        except FileNotFoundError:  # the folder's own, closed since
            continue
    return {entry for entry in found if "asyncdcp-arena" in entry} - _before


def mappings() -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if "asyncdcp-arena" in line and line not in _before]


def smaps(address: int) -> str:
    text = Path("/proc/self/smaps").read_text()
    found = re.search(rf"^{address:x}-.*?(?=^[0-9a-f]+-|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[0]


# ── memory ──


def test_slots_are_parts_of_one_buffer(arena: Arena) -> None:
    arena.slot(2)[:3] = b"abc"
    assert bytes(arena.buffer[2 * 8192 : 2 * 8192 + 4]) == b"abc\0"
    buffer = arena.buffer
    assert (buffer.format, buffer.nbytes, buffer.readonly) == ("B", 4 * 8192, False)
    assert arena.nbytes == 4 * 8192
    assert arena.address % mmap.PAGESIZE == 0
    for wrong in (-1, 4):
        with pytest.raises(IndexError):
            arena.slot(wrong)


def test_attach_sees_the_same_memory_and_owns_its_descriptor(arena: Arena) -> None:
    with Arena.attach(os.dup(arena.fd), 4, 8192) as other:
        other.slot(1)[0] = 7
        assert arena.slot(1)[0] == 7
        assert other.address != arena.address
    arena.slot(1)[0] = 8


def test_attach_refuses_what_is_too_small(arena: Arena) -> None:
    before = descriptors()
    with pytest.raises(InvalidOption, match="32768 bytes"):
        Arena.attach(arena.fd, 5, 8192)
    assert descriptors() == before


@pytest.mark.parametrize(("slots", "slot_bytes"), [(0, 4096), (-1, 4096), (1, 0), (1, 4095), (1, -4096)])
def test_sizes_are_checked(slots: int, slot_bytes: int) -> None:
    with pytest.raises(InvalidOption):
        Arena(slots, slot_bytes)


def test_the_descriptor_is_not_inherited_and_the_mapping_neither_forked_nor_dumped(arena: Arena) -> None:
    assert not os.get_inheritable(arena.fd)
    flags = re.search(r"^VmFlags:(.*)$", smaps(arena.address), re.MULTILINE)
    assert flags is not None
    assert {"dc", "dd"} <= set(flags[1].split())


# ── close ──


def test_close_leaves_no_descriptor_and_no_mapping() -> None:
    assert not descriptors()
    arena = Arena(4, 8192)
    assert len(descriptors()) == 1
    assert len(mappings()) == 1
    arena.close()
    arena.close()
    assert arena.closed
    assert not descriptors()
    assert not mappings()


def test_a_view_keeps_the_mapping_but_not_the_descriptor() -> None:
    arena = Arena(4, 8192)
    view = arena.slot(3)
    arena.close()
    assert not descriptors()
    view[0] = 1
    assert view[0] == 1
    part = view[10:20]
    del view
    assert len(mappings()) == 1
    part.release()
    assert not mappings()


def test_a_closed_arena_refuses(arena: Arena) -> None:
    arena.close()
    for use in (
        lambda: arena.fd,
        lambda: arena.address,
        lambda: arena.buffer,
        lambda: arena.slot(0),
        lambda: arena.prefault(),
    ):
        with pytest.raises(Closed):
            use()


def test_an_unclosed_arena_warns_and_leaks_nothing() -> None:
    arena = Arena(1, 4096)
    with pytest.warns(ResourceWarning, match=r"unclosed <Arena 1\*4096"):
        del arena
        gc.collect()
    assert not descriptors()
    assert not mappings()


def test_a_fork_has_no_arena(arena: Arena) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: a thread of another test may be there
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with pytest.raises(Closed, match="fork"):
                _ = arena.buffer
            assert not mappings()
            assert not descriptors()
            arena.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    arena.slot(0)[0] = 1


# ── prefault ──


def test_prefault_makes_pages_resident_and_keeps_contents() -> None:
    with Arena(8, MIB) as arena:
        arena.slot(5)[:3] = b"abc"
        steps: list[int] = []
        assert arena.prefault(progress=steps.append) == 8 * MIB
        assert steps == [8 * MIB]
        assert os.fstat(arena.fd).st_blocks * 512 == 8 * MIB
        resident = re.search(r"^Rss:\s+(\d+) kB$", smaps(arena.address), re.MULTILINE)
        assert resident is not None
        assert int(resident[1]) == 8 * 1024
        assert bytes(arena.slot(5)[:3]) == b"abc"


def test_prefault_goes_in_steps_and_stops_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_PREFAULT_STEP", MIB)
    with Arena(3, MIB) as arena:
        steps: list[int] = []
        assert arena.prefault(progress=steps.append, should_stop=lambda: len(steps) == 2) == 2 * MIB
        assert steps == [MIB, 2 * MIB]
        assert os.fstat(arena.fd).st_blocks * 512 == 2 * MIB


def test_close_ends_a_prefault_on_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_PREFAULT_STEP", 4096)
    arena, taken = Arena(2, MIB), []
    begun, closed = threading.Event(), threading.Event()

    def progress(_: int) -> None:
        begun.set()
        assert closed.wait(30)

    thread = threading.Thread(target=lambda: taken.append(arena.prefault(progress=progress)))
    thread.start()
    assert begun.wait(30)
    arena.close()
    closed.set()
    thread.join()
    assert taken == [4096]
    assert not mappings()


class FakeLibc:
    """madvise that answers with ``codes`` in turn, then succeeds."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)
        self.calls = 0

    def madvise(self, *_: int) -> int:
        self.calls += 1
        if not self.codes:
            return 0
        ctypes.set_errno(self.codes.pop(0))
        return -1


def test_prefault_without_populate(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_PREFAULT_STEP", 8192)
    libc = FakeLibc(errno.EINTR, errno.EINVAL)
    monkeypatch.setattr(arena_module, "_libc", libc)
    assert arena.prefault() == 4 * 8192
    assert libc.calls == 2  # once more after EINTR, never again after EINVAL
    assert os.fstat(arena.fd).st_blocks * 512 == 4 * 8192
    monkeypatch.undo()


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.ENOSPC])
def test_prefault_out_of_memory(arena: Arena, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MemoryLimit, match="staging_bytes"):
        arena.prefault()
    monkeypatch.undo()
    monkeypatch.setattr(arena_module, "_libc", FakeLibc(code))
    with pytest.raises(MemoryLimit, match="staging_bytes"):
        arena.prefault()
    monkeypatch.undo()


def test_a_mapping_refused_is_a_memory_limit_and_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "check_memory", lambda *_, **__: None)
    with pytest.raises(MemoryLimit, match="staging_bytes"):
        Arena(1 << 20, 1 << 30)  # 2**50 bytes: more addresses than there are
    assert not descriptors()


def test_a_limit_of_file_sizes_is_named_and_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, length: int) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))  # a real limit would hold for all that the tests write

    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(MemoryLimit, match=r"4,096 bytes.*File too large.*\(ulimit -f\)"):
        Arena(1, 4096)
    assert not descriptors()


def test_an_arena_beyond_memory_is_refused_before_it_is_made() -> None:
    with pytest.raises(MemoryLimit, match="the staging arena needs"):
        Arena(1 << 20, 1 << 30)
    assert not descriptors()


# ── memory limits ──

MEMINFO = "MemTotal:       16000000 kB\nMemFree:          100000 kB\nMemAvailable:    2000000 kB\nBuffers: 1 kB\n"


def test_meminfo() -> None:
    assert parse_meminfo(MEMINFO) == 2_000_000 * 1024
    assert parse_meminfo("MemTotal: 1 kB\n") is None


def test_cgroups_of_both_versions() -> None:
    text = "9:name=systemd:/a\n4:cpu,memory:/jobs/17:x\n0::/user.slice/a\n"
    assert parse_cgroups(text) == [(1, "/jobs/17:x"), (2, "/user.slice/a")]


def test_headroom_counts_inactive_page_cache() -> None:
    assert parse_headroom("1000\n", "400\n", "anon 10\ninactive_file 150\nactive_file 5\n") == 750
    assert parse_headroom("1000\n", "400\n", "inactive_file 1\ntotal_inactive_file 150\n") == 750
    assert parse_headroom("1000", "2000", "") == 0
    assert parse_headroom("max\n", "400\n", "") is None
    assert parse_headroom("9223372036854771712\n", "400\n", "") is None


def test_ancestors_end_at_the_root() -> None:
    assert list(ancestors("/a/b")) == ["a/b", "a", "."]
    assert list(ancestors("/")) == ["."]
    assert list(ancestors("/../x")) == ["x", "."]


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def version_2(folder: str, limit: str, usage: str) -> dict[str, str]:
    base = f"sys/fs/cgroup/{folder}"
    return {
        f"{base}/memory.max": limit,
        f"{base}/memory.current": usage,
        f"{base}/memory.stat": "inactive_file 4096\n",
    }


def test_the_tightest_of_machine_and_cgroups_counts(tmp_path: Path) -> None:
    assert tightest(tmp_path) is None
    check_memory(1 << 60, what="it", root=tmp_path)
    put(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/job/step\n"})
    assert tightest(tmp_path) == Headroom(2_000_000 * 1024, "MemAvailable in /proc/meminfo")
    put(tmp_path, version_2("job/step", "max\n", "1\n") | version_2("job", f"{10 * MIB}\n", f"{6 * MIB}\n"))
    assert tightest(tmp_path) == Headroom(4 * MIB + 4096, "/sys/fs/cgroup/job/memory.max")


def test_version_1_in_a_container_without_the_hosts_path(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory"
    put(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/0123\n0::/\n",
            f"{base}/memory.limit_in_bytes": f"{8 * MIB}\n",
            f"{base}/memory.usage_in_bytes": f"{5 * MIB}\n",
            f"{base}/memory.stat": f"inactive_file 1\ntotal_inactive_file {MIB}\n",
        },
    )
    assert tightest(tmp_path) == Headroom(4 * MIB, "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def test_the_refusal_names_need_rest_limit_and_way_out(tmp_path: Path) -> None:
    put(tmp_path, {"proc/self/cgroup": "0::/job\n"} | version_2("job", f"{10 * MIB}\n", f"{6 * MIB + 4096}\n"))
    check_memory(4 * MIB, what="the arena", root=tmp_path)
    with pytest.raises(MemoryLimit) as info:
        check_memory(4 * MIB + 1, what="the arena", root=tmp_path)
    for part in ("the arena", "4.0 MiB", "/sys/fs/cgroup/job/memory.max", "staging_bytes="):
        assert part in str(info.value)


def test_this_machine_says_something() -> None:
    found = tightest()
    assert found is not None
    assert found.available > 0


# ── the ring ──


def test_slabs_take_slots_in_turn(backend: str) -> None:
    async def main() -> None:
        ring = SlotRing(2)
        assert [await ring.acquire(), await ring.acquire()] == [(0, 0), (1, 1)]
        ring.release(0)
        assert await ring.acquire() == (2, 0)
        assert ring.statistics() == SlotRingStatistics(slots=2, in_use=2, peak_in_use=2, waiting=0)

    anyio.run(main, backend=backend)


def test_a_slab_waits_for_its_own_slot_in_order(backend: str) -> None:
    async def main() -> None:
        ring, got = SlotRing(2), []

        async def take(name: str) -> None:
            got.append((name, *await ring.acquire()))

        await ring.acquire()
        await ring.acquire()
        async with anyio.create_task_group() as group:
            for name in "abc":
                group.start_soon(take, name)
                await anyio.wait_all_tasks_blocked()
            ring.release(1)
            await anyio.wait_all_tasks_blocked()
            assert got == []
            assert ring.statistics() == SlotRingStatistics(slots=2, in_use=1, peak_in_use=2, waiting=3)
            ring.release(0)
            await anyio.wait_all_tasks_blocked()
            assert got == [("a", 2, 0), ("b", 3, 1)]
            ring.release(0)
        assert got[-1] == ("c", 4, 0)

    anyio.run(main, backend=backend)


@pytest.mark.parametrize("turn", ["not yet", "given"])
def test_a_cancelled_slab_loses_nothing(backend: str, turn: str) -> None:
    async def main() -> None:
        ring, got = SlotRing(1), []

        async def take(name: str, scope: anyio.CancelScope) -> None:
            with scope:
                got.append((name, *await ring.acquire()))

        await ring.acquire()
        scope = anyio.CancelScope()
        async with anyio.create_task_group() as group:
            group.start_soon(take, "first", scope)
            await anyio.wait_all_tasks_blocked()
            group.start_soon(take, "second", anyio.CancelScope())
            await anyio.wait_all_tasks_blocked()
            if turn == "given":  # too late to cancel: the first one has it
                ring.release(0)
            scope.cancel()
            await anyio.wait_all_tasks_blocked()
            assert ring.statistics().waiting == 1
            ring.release(0)
        assert got == ([("first", 1, 0), ("second", 2, 0)] if turn == "given" else [("second", 1, 0)])

    anyio.run(main, backend=backend)


async def test_a_slab_cancelled_with_its_turn_passes_it_on() -> None:
    ring = SlotRing(1)
    await ring.acquire()
    first = asyncio.create_task(ring.acquire())
    second = asyncio.create_task(ring.acquire())
    await anyio.wait_all_tasks_blocked()
    ring.release(0)
    first.cancel()  # asyncio's own cancellation comes first even where the wait had ended
    assert await second == (1, 0)
    assert first.cancelled()
    assert ring.statistics().waiting == 0


def test_wrong_releases_raise(backend: str) -> None:
    async def main() -> None:
        ring = SlotRing(2)
        with pytest.raises(RuntimeError, match="slot 0"):
            ring.release(0)
        await ring.acquire()
        ring.release(0)
        with pytest.raises(RuntimeError, match="slot 0"):
            ring.release(0)
        for wrong in (-1, 2):
            with pytest.raises(IndexError):
                ring.release(wrong)
        with pytest.raises(RuntimeError, match="thread"):
            await anyio.to_thread.run_sync(ring.release, 0)

    anyio.run(main, backend=backend)


def test_a_ring_has_slots() -> None:
    with pytest.raises(InvalidOption):
        SlotRing(0)


async def test_acquire_nowait_takes_what_is_free_and_passes_nobody() -> None:
    ring = SlotRing(2)
    assert ring.acquire_nowait() == (0, 0)
    assert ring.acquire_nowait() == (1, 1)
    assert ring.acquire_nowait() is None
    got: list[tuple[int, int]] = []

    async def wait() -> None:
        got.append(await ring.acquire())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        ring.release(0)
        assert ring.acquire_nowait() is None, "slot 0 is free, and the one who waits for it is first"
    ring.release(1)
    assert got == [(2, 0)]
    assert ring.acquire_nowait() == (3, 1)


@given(slots=st.integers(1, 4), steps=st.lists(st.integers(0, 5), max_size=40))
def test_whatever_happens_grants_are_gapless_in_order_and_exclusive(slots: int, steps: list[int]) -> None:
    """Steps: 0 release the oldest, 1 the newest; 2 cancel the first waiting, 3 the last; else acquire."""

    async def main() -> None:
        ring, held, granted = SlotRing(slots), [], []
        waiting: dict[int, anyio.CancelScope] = {}

        async def take(number: int) -> None:
            with waiting[number]:
                sequence, slot = await ring.acquire()
                granted.append((number, sequence))
                assert slot == sequence % slots
                assert slot not in held
                held.append(slot)
            del waiting[number]

        async with anyio.create_task_group() as group:
            for number, step in enumerate(steps):
                if step <= 1 and held:
                    ring.release(held.pop(-step))
                elif step in (2, 3) and waiting:
                    waiting[(min if step == 2 else max)(waiting)].cancel()
                elif step >= 4:
                    waiting[number] = anyio.CancelScope()
                    group.start_soon(take, number)
                if step != 1:  # now and then two events before anyone runs
                    await anyio.wait_all_tasks_blocked()
            await anyio.wait_all_tasks_blocked()
            assert ring.statistics().waiting == len(waiting)
            assert ring.statistics().in_use == len(held)
            while waiting:
                ring.release(held.pop(0))
                await anyio.wait_all_tasks_blocked()
        assert [sequence for _, sequence in granted] == list(range(len(granted)))
        assert granted == sorted(granted)

    anyio.run(main, backend="trio")
