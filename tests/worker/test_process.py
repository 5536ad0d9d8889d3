"""The process itself: how it starts, what it is, what it inherits, what it outlives."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import asyncdcp
from asyncdcp import AsyncCheckpointer, Options
from asyncdcp.errors import Closed, InvalidOption, WorkerCrashed
from asyncdcp.worker import launch, surroundings
from asyncdcp.worker.process import CheckpointProcess
from asyncdcp.worker.protocol import IGNORED, VERSION, Configure, Inspection
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
def test_its_session_is_nicer_too(opened: Opened) -> None:
    before = niceness_of_session(os.getpid())
    assert niceness_of_session(worker_of(opened(worker_nice=7)).pid) == min(before + 7, 19)


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


def test_its_log_reaches_the_trainers(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    arrived = threading.Event()
    caplog.handler.addFilter(lambda record: arrived.set() or True)  # type: ignore[func-returns-value]
    with caplog.at_level(logging.WARNING, logger="asyncdcp"):
        worker_of(opened(worker_affinity=frozenset({100_000})))  # refused, which is no reason not to save
        assert arrived.wait(LONG)
    assert "could not set its CPUs" in caplog.text
    assert caplog.records[0].processName == "asyncdcp-worker"


# ── starting, anywhere ──

PROGRAM = """
    import os, sys, torch
    with open("began", "a") as file: file.write("x")
    from asyncdcp import AsyncCheckpointer
    checkpointer = AsyncCheckpointer(process=True)
    checkpointer.save("saved", {"w": torch.arange(10)}).result(30)
    print(checkpointer._lanes.pipeline.process.pid)
    checkpointer.close()
"""


def run(tmp_path: Path, *arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=LONG, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not Path(f"/proc/{int(done.stdout)}").exists()
    assert (tmp_path / "began").read_text() == "x"  # the user's program was not run a second time
    (tmp_path / "began").unlink()


def test_starts_from_any_script(tmp_path: Path) -> None:
    """As a script without a guard, beside modules that hide the standard library's, in a hostile environment. By -c
    they start below.
    """
    folder = tmp_path / "scripts"
    folder.mkdir()
    for name in ("selectors", "socket", "asyncio"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    script = folder / "program.py"
    script.write_text(textwrap.dedent(PROGRAM))
    run(tmp_path, str(script), PYTHONWARNINGS="error", PYTHONINSPECT="1", PYTHONSTARTUP="nowhere")


def test_starts_without_site_from_a_path_set_by_hand(tmp_path: Path) -> None:
    places = launch.import_places()
    code = f"import sys; sys.path += {places!r}\n" + textwrap.dedent(PROGRAM)
    run(tmp_path, "-I", "-S", "-c", code)


def test_starts_from_a_zip_file(tmp_path: Path) -> None:
    root = Path(asyncdcp.__file__ or "").parent
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        for path in root.rglob("*.py"):
            archive.write(path, Path("asyncdcp") / path.relative_to(root))
    code = "import sys; sys.path.insert(0, 'app.zip'); import asyncdcp; assert 'app.zip' in asyncdcp.__file__\n"
    run(tmp_path, "-c", code + textwrap.dedent(PROGRAM))


def test_one_that_cannot_start_says_why(opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "import_places", lambda: [])
    checkpointer = opened()
    with pytest.raises(WorkerCrashed, match="No module named 'asyncdcp'"):
        checkpointer.save(tmp_path, state(1)).result(LONG)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(WorkerCrashed, match="could not be started"):
        checkpointer.save(tmp_path, state(1)).result(LONG)
    monkeypatch.undo()
    checkpointer.save(tmp_path, state(1)).result(LONG)


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> queue.Queue[int]:
    """The pids of the processes that are started, as they are."""
    pids, spawn = queue.Queue[int](), os.posix_spawn

    def spawn_and_tell(*args: Any, **kwargs: Any) -> int:
        pids.put(pid := spawn(*args, **kwargs))
        return pid

    monkeypatch.setattr(os, "posix_spawn", spawn_and_tell)
    return pids


def is_there(pid: int) -> bool:
    """Whether it is there, if only as a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_that_hangs_at_its_start_has_a_deadline(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spawned: queue.Queue[int]
) -> None:
    monkeypatch.setattr(launch, "_BOOT", "import signal; signal.pause()")
    with pytest.raises(WorkerCrashed, match=r"not ready within 0\.2 s"):
        opened(worker_start_deadline=0.2).save(tmp_path, state(1)).result(LONG)
    assert not is_there(spawned.get(timeout=LONG))


def test_one_that_starts_while_its_checkpointer_closes_leaves_nothing(spawned: queue.Queue[int]) -> None:
    before = descriptors()
    checkpointer = AsyncCheckpointer(process=True)
    prepared = checkpointer.prepare(state(1))
    pid = spawned.get(timeout=LONG)
    checkpointer.close()
    with pytest.raises(Closed):
        prepared.result(LONG)
    assert not is_there(pid)
    del checkpointer, prepared
    assert descriptors() == before


async def test_a_start_that_is_cancelled_again_as_it_cleans_up_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch, spawned: queue.Queue[int]
) -> None:
    """And the process does not die at once, as in an uninterruptible wait of the kernel."""
    before = descriptors()
    monkeypatch.setattr(CheckpointProcess, "_send_kill", lambda _: None)
    start = asyncio.create_task(CheckpointProcess.start(Options()))
    pid = await asyncio.to_thread(spawned.get, timeout=LONG)
    for _ in range(2):
        start.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await start
    await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WEXITED)  # it finds the socket closed
    assert descriptors() == before


async def test_one_that_cannot_be_watched_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch, spawned: queue.Queue[int]
) -> None:
    before = descriptors()

    def full(*_: object) -> None:
        raise OSError(28, "no more watches")

    monkeypatch.setattr(asyncio.get_running_loop(), "add_reader", full)
    with pytest.raises(WorkerCrashed, match="no more watches"):
        await CheckpointProcess.start(Options())
    await asyncio.to_thread(os.waitid, os.P_PID, spawned.get(), os.WEXITED)
    assert descriptors() == before


def descriptors() -> list[str]:
    gc.collect()
    return sorted(os.listdir("/proc/self/fd"))


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
