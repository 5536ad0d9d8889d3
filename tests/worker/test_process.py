"""The process itself: what it is, what it inherits, what it outlives."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import queue
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncdcp import AsyncCheckpointer, Options
from asyncdcp.errors import InvalidOption
from asyncdcp.storage.spec import LocalSpec
from asyncdcp.worker import launch, main, surroundings
from asyncdcp.worker.protocol import IGNORED, VERSION, Begin, Configure, Inspection
from tests.worker.conftest import LONG, Opened, has_ended, state, worker_of

MEGABYTE = 1_000_000


def inspected(checkpointer: AsyncCheckpointer) -> Inspection:
    return checkpointer._engine.submit(worker_of(checkpointer).inspect).result(LONG)


def test_is_small_and_has_no_torch(opened: Opened, tmp_path: Path) -> None:
    checkpointer = opened()
    for number in range(3):
        checkpointer.save(tmp_path / str(number), state(number)).result(LONG)
    seen = inspected(checkpointer)
    assert seen.rss_bytes < 60 * MEGABYTE
    assert not {module.partition(".")[0] for module in seen.modules} & {"torch", "numpy", "multiprocessing", "pytest"}
    assert seen.pid == worker_of(checkpointer).pid
    assert (seen.arenas, seen.saves) == (1, 0)


def test_outlives_what_is_sent_to_everybody(opened: Opened, tmp_path: Path) -> None:
    checkpointer = opened()
    pid = worker_of(checkpointer).pid
    for number in IGNORED:
        os.kill(pid, number)
    checkpointer.save(tmp_path, state(1)).result(LONG)
    assert worker_of(checkpointer).pid == pid
    assert os.getsid(pid) == pid != os.getsid(0)


def test_holds_nothing_of_the_trainer(opened: Opened) -> None:
    stray = os.memfd_create("stray")
    os.set_inheritable(stray, True)
    pid = worker_of(opened()).pid
    os.close(stray)
    links = {number: os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")}
    assert [links[number] for number in "012"] == ["/dev/null"] * 3
    assert not [link for link in links.values() if "stray" in link or "pipe" in link or "stderr" in link]


def test_a_stray_beyond_the_limit_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    number = fcntl.fcntl(0, fcntl.F_DUPFD, 900)
    monkeypatch.setattr(os, "sysconf", lambda _: 500)  # lowered since
    surroundings.close_strays(number)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_priorities(opened: Opened) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    cpu = min(os.sched_getaffinity(0))
    checkpointer = opened(worker_nice=7, worker_io_priority="idle", worker_affinity=frozenset({cpu}))
    assert inspected(checkpointer).nice == min(before + 7, 19)
    pid = worker_of(checkpointer).pid
    assert os.sched_getaffinity(pid) == {cpu}
    shown = subprocess.run(["ionice", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    assert "idle" in shown


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel does not share CPUs out by session")
def test_its_session_is_nicer_too(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sooner or later: processes that others start may have their turns before."""
    patient = f"from asyncdcp.worker import surroundings; surroundings._SESSION_SECONDS = {LONG}; from asyncdcp"
    monkeypatch.setattr(launch, "_BOOT", launch._BOOT.replace("from asyncdcp", patient, 1))
    before = niceness_of_session(os.getpid())
    assert niceness_of_session(worker_of(opened(worker_nice=7, worker_start_deadline=LONG)).pid) == min(before + 7, 19)


@pytest.mark.skipif(not Path("/proc/1/autogroup").exists(), reason="this kernel does not share CPUs out by session")
def test_a_trainer_without_a_session_group_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of init, and of what it started without a new session, the system says nothing."""
    group = Path("/proc/1/autogroup").read_text().split()
    assert surroundings._session_niceness(1) == (int(group[-1]) if group else 0)
    monkeypatch.setattr(surroundings, "_session_niceness", lambda _: -100)  # more than anyone is allowed
    surroundings.set_priorities(Configure(VERSION, 0, None, sorted(os.sched_getaffinity(0)), logging.WARNING))


def niceness_of_session(pid: int) -> int:
    words = Path(f"/proc/{pid}/autogroup").read_text().split()
    return int(words[-1]) if words else 0


@pytest.mark.parametrize(
    "wrong",
    [{"worker_nice": 20}, {"worker_io_priority": 8}, {"worker_affinity": frozenset()}, {"worker_start_deadline": 0}],
)
def test_options_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidOption, match=next(iter(wrong))):
        Options(**wrong)  # type: ignore[arg-type]  # that is the point


def test_its_log_reaches_the_trainers(
    opened: Opened, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = queue.Queue[logging.LogRecord]()
    monkeypatch.setattr(caplog.handler, "emit", arrived.put)
    with caplog.at_level(logging.WARNING, logger="asyncdcp"):
        worker_of(opened(worker_affinity=frozenset({100_000})))  # refused, which is no reason not to save
        while "could not set its CPUs" not in (record := arrived.get(timeout=LONG)).getMessage():
            pass
    assert record.processName == "asyncdcp-worker"


async def test_a_save_that_cannot_be_begun_is_answered_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(*_: object, **__: object) -> None:
        raise LookupError("a library's own")

    ours, theirs = socket.socketpair()
    trainer = os.pidfd_open(os.getpid())
    worker, answers = main.Worker(theirs, trainer), list[Any]()
    monkeypatch.setattr(worker, "post", answers.append)
    monkeypatch.setattr(main, "open_spec", odd)
    worker._on_message(Begin(0, LocalSpec(b"/nowhere"), SimpleNamespace(save_id="x")))  # type: ignore[arg-type]
    [failed] = answers
    assert failed.save == "x" and failed.error.message == "LookupError: a library's own"
    worker._connection.close()
    asyncio.get_running_loop().remove_reader(trainer)
    os.close(trainer)
    ours.close()


# ── forks of the trainer ──


def test_a_forked_child_holds_neither_socket_nor_memory(opened: Opened, tmp_path: Path) -> None:
    checkpointer = opened()
    checkpointer.save(tmp_path / "a", state(1)).result(LONG)
    process = worker_of(checkpointer)
    held = {os.readlink(f"/proc/self/fd/{fd}") for fd in (process._connection._sock.fileno(), process._pidfd)}
    child = in_fork(lambda: no_descriptor(held) and no_arena())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    checkpointer.save(tmp_path / "b", state(2)).result(LONG)  # and the parent's loop is as it was
    assert worker_of(checkpointer) is process


def in_fork(check: Callable[[], bool]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if check() else 2
        finally:
            os._exit(code)
    return pid


def no_descriptor(held: set[str]) -> bool:
    links = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    sockets = {link for link in held if link.startswith("socket")}
    return bool(sockets) and not sockets & links and not any("asyncdcp-arena" in link for link in links)


def no_arena() -> bool:
    return "asyncdcp-arena" not in Path("/proc/self/maps").read_text()


def test_its_death_is_seen_and_it_is_reaped(opened: Opened) -> None:
    checkpointer = opened()
    process = worker_of(checkpointer)
    pidfd = os.pidfd_open(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    assert has_ended(pidfd)
    os.close(pidfd)
    checkpointer._engine.submit(process.died.wait).result(LONG)
    assert process.signal == signal.SIGKILL
    assert not Path(f"/proc/{process.pid}").exists()
