"""What the cases share: turns, folders, the page cache, processor time, progress."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from asyncdcp.format.blocks import SLAB_BYTES
from asyncdcp.storage.posix import PAGE, SYSTEM
from tests.benchmarks.peers.peer import Peer, opened
from tests.benchmarks.states import tensors_of

T = TypeVar("T")

_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass
class Setting:
    """What the command line asked for. ``folder`` is on the filesystem to measure; a case cleans up after itself."""

    folder: Path
    size: str
    rounds: int
    saves: int
    peers: Sequence[type[Peer]]
    progress: Callable[[str], object] = field(default=lambda text: _say(text))


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def turns(setting: Setting, case: str, subjects: Sequence[T], name: Callable[[T], str]) -> Iterator[tuple[int, T]]:
    """``(round, subject)``: every subject in turn, one round to warm up (number 0) and then ``setting.rounds``. The
    order moves on by one each round, so that nobody always follows the same one.
    """
    for number in range(setting.rounds + 1):
        first = number % len(subjects)
        for subject in [*subjects[first:], *subjects[:first]]:
            what = f"round {number} of {setting.rounds}" if number else "warming up"
            setting.progress(f"{case}: {what}, {name(subject)}")
            gc.collect()
            yield number, subject


@contextmanager
def place(setting: Setting) -> Iterator[Path]:
    """A name for a new folder; it is deleted afterwards, and the disk is at rest then."""
    folder = setting.folder / f"turn-{time.monotonic_ns()}"
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()  # or the next one's fsync pays for the deletion


def timed(function: Callable[[], object]) -> float:
    """Seconds."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def drop_from_cache(folder: Path) -> None:
    """Afterwards the page cache has none of the folder's files. Raises RuntimeError where it does not let go."""
    cached = pages = 0
    for path in _files(folder):
        with opened(path, os.O_RDONLY) as fd:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(fd).st_size
            cached += SYSTEM.cached_pages(fd, 0, size) or 0
            pages += -(-size // PAGE)
    if cached > 0.02 * pages:
        raise RuntimeError(f"{cached / pages:.0%} of {folder} stays in the page cache: a cold load cannot be measured")


def bring_into_cache(folder: Path) -> None:
    """Reads the folder's files."""
    for path in _files(folder):
        with open(path, "rb", buffering=0) as file:
            while file.read(SLAB_BYTES):
                pass


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def check_equal(source: Any, target: Any, who: str) -> None:
    """Raises RuntimeError unless the target holds what the source does; a measurement of a wrong load is none."""
    targets = tensors_of(target)
    wrong = [name for name, tensor in tensors_of(source).items() if not torch.equal(tensor, targets[name])]
    if wrong:
        raise RuntimeError(f"{who} did not load what it saved: {', '.join(wrong[:5])}")


def clear(target: Any) -> None:
    """Zeroes, so that a load that does nothing is found."""
    for tensor in tensors_of(target).values():
        tensor.zero_()


def own_cpu() -> float:
    """Processor seconds of this process so far."""
    return time.process_time()


def background_cpu() -> float:
    """Processor seconds of all processes below this one that live."""
    return sum(_cpu(pid) for pid in descendants())


def descendants() -> list[int]:
    """The processes that this one has started, and theirs."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            parents[int(entry)] = int(fields[1])
    found: list[int] = []
    layer = {os.getpid()}
    while layer:
        layer = {pid for pid, parent in parents.items() if parent in layer}
        found += layer
    return found


def _cpu(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS if fields else 0.0


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` behind the name, the state first; empty where the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
