"""What the child does to its own process: signals, priorities, CPUs, stray descriptors, standard streams."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from asyncdcp.worker.protocol import IGNORED, Configure, Inspection

_IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30, "ppc64le": 273, "s390x": 282, "riscv64": 30}
_IOPRIO_WHO_PROCESS: Final = 1
_IOPRIO_BEST_EFFORT: Final = 2 << 13
_IOPRIO_IDLE: Final = 3 << 13
_PR_SET_NAME: Final = 15
_MOST_NICE: Final = 19
_SESSION_SECONDS: Final = 0.5
_STRAYS_LIMIT: Final = 1 << 16
"""So far strays are looked for where there is no /proc."""

_logger = logging.getLogger("asyncdcp")


def ignore_signals() -> None:
    """Ignores what the worker outlives, and unblocks it: the trainer started the worker with these blocked, so that
    none could end it before.
    """
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def close_strays(first: int) -> None:
    """Closes every descriptor from ``first`` on: what other libraries of the trainer left inheritable.

    Those that are open, and not all that may be: the limit can be a billion, as in containers, which takes minutes
    where Python was built without ``close_range``; and it can be lower than it was when one was opened.
    """
    folder = "/proc/self/fd"
    for number in map(int, os.listdir(folder)) if os.path.isdir(folder) else range(first, _STRAYS_LIMIT):
        if number >= first:
            with suppress(OSError):  # the listing's own
                os.close(number)


def detach_stderr() -> None:
    """From here on nothing that the trainer's terminal or pipes are attached to is held open."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    os.close(null)


def name_process(name: bytes) -> None:
    """The name that ``ps -o comm`` and ``top`` show."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, ctypes.c_char_p(name), 0, 0, 0)


def set_priorities(configure: Configure) -> None:
    """Niceness, I/O priority and CPUs. What the system refuses is logged, each by itself: a save matters more."""
    with _tolerated("niceness"):
        os.setpriority(os.PRIO_PROCESS, 0, min(os.getpriority(os.PRIO_PROCESS, 0) + configure.nice, _MOST_NICE))
    if configure.affinity is not None:
        with _tolerated("CPUs"):
            os.sched_setaffinity(0, configure.affinity)
    if configure.io_priority is not None:
        with _tolerated("I/O priority"):
            _set_io_priority(configure.io_priority)
    with _tolerated("session's niceness"):
        _set_session_niceness(configure.nice)


@contextmanager
def _tolerated(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _logger.warning("the background process could not set its %s: %s", what, error)


def _set_session_niceness(nice: int) -> None:
    """Where the kernel shares the CPUs out by session (sched_autogroup), niceness counts only within one. The worker
    has a session of its own, which would get as much as the trainer's: measured, twice its stall.
    """
    with suppress(FileNotFoundError):  # a kernel without
        wanted = str(min(_session_niceness(os.getppid()) + nice, _MOST_NICE))
        until = time.monotonic() + _SESSION_SECONDS
        while True:
            try:
                with open("/proc/self/autogroup", "w", encoding="ascii") as own:
                    own.write(wanted)
                return
            except BlockingIOError:  # the system takes one such write each 100 ms from all users together
                if time.monotonic() > until:
                    raise
                time.sleep(0.05 + os.getpid() % 50 / 1000)


def _session_niceness(pid: int) -> int:
    """0 for a process that is in no session's group, as init and what it started: its file is empty."""
    with open(f"/proc/{pid}/autogroup", encoding="ascii") as group:
        words = group.read().split()
    return int(words[-1]) if words else 0


def _set_io_priority(priority: str | int) -> None:
    number = _IOPRIO_SET.get(platform.machine())
    if number is None:
        raise OSError(f"no ioprio_set is known for {platform.machine()}")
    value = _IOPRIO_IDLE if isinstance(priority, str) else _IOPRIO_BEST_EFFORT | priority
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(number), _IOPRIO_WHO_PROCESS, 0, value) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def inspection(modules: list[str], arenas: int, saves: int) -> Inspection:
    """What /proc says of this process."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        fields = dict(line.split(":", 1) for line in status if ":" in line)
    kibibytes = sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))
    descriptors = 0
    with suppress(OSError):
        descriptors = len(os.listdir("/proc/self/fd")) - 1
    return Inspection(
        pid=os.getpid(),
        modules=modules,
        rss_bytes=kibibytes << 10,
        descriptors=descriptors,
        threads=int(fields["Threads"]),
        arenas=arenas,
        saves=saves,
        nice=os.getpriority(os.PRIO_PROCESS, 0),
    )
