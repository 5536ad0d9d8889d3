"""The arena's memory, descriptors and mappings."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import re
import resource
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from asyncdcp import arena as arena_module
from asyncdcp.arena import Arena
from asyncdcp.errors import Closed, InvalidOption, MemoryLimit

MIB = 1 << 20


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena(4, 8192) as made:
        yield made


_before: set[str] = set()
"""What other tests of this process have left to the garbage collector, or for good, as an abandoned arena is."""


@pytest.fixture(autouse=True)
def _apart_from_other_tests() -> None:
    _before.clear()
    if descriptors() or mappings():
        gc.collect()
    _before.update(descriptors(), mappings())


def descriptors() -> set[str]:
    folder = "/proc/self/fd"
    found = set()
    for name in os.listdir(folder):
        try:
            found.add(f"{name} {os.readlink(f'{folder}/{name}')} {os.stat(f'{folder}/{name}').st_ino}")
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


@pytest.mark.parametrize("call", ["ftruncate", "close"])
def test_nobody_forks_while_an_arena_is_made_or_closed(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    free: list[bool] = []
    function = getattr(os, call)

    def look(*args: int) -> None:
        monkeypatch.setattr(os, call, function)
        free.append(pool.submit(arena_module._making.acquire, blocking=False).result())
        function(*args)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        monkeypatch.setattr(os, call, look)
        Arena(1, 4096).close()
        assert free == [False]


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
            with ThreadPoolExecutor(1) as pool:
                pool.submit(Arena, 1, 4096).result().close()
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


def test_a_limit_of_addresses_is_named_and_leaks_nothing() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), before[1]))  # threads of other tests have room
    try:
        with pytest.raises(MemoryLimit, match=r"536,870,912 bytes.*Cannot allocate.*\(ulimit -v\)"):
            Arena(1, 512 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
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
