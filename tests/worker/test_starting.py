"""How the process starts, wherever its trainer came from; and that one that does not start leaves nothing."""

from __future__ import annotations

import asyncio
import os
import queue
import socket
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest

import asyncdcp
from asyncdcp import AsyncCheckpointer, Options
from asyncdcp.errors import Closed, WorkerCrashed
from asyncdcp.worker import launch, process
from asyncdcp.worker.main import SOCKET_FD
from asyncdcp.worker.process import CheckpointProcess
from tests.work import open_descriptors
from tests.worker.conftest import LONG, Opened, state

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
    monkeypatch.setattr(process, "_KILL_SECONDS", LONG)  # they die when the system comes to it

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


@pytest.fixture
def never_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that are started wait until their trainer's socket is closed."""
    code = f"import socket\nsock = socket.socket(fileno={SOCKET_FD})\nwhile sock.recv(4096): pass"
    monkeypatch.setattr(launch, "_BOOT", code)


@pytest.mark.usefixtures("never_ready")
def test_one_that_starts_while_its_checkpointer_closes_leaves_nothing(spawned: queue.Queue[int]) -> None:
    before = open_descriptors()
    checkpointer = AsyncCheckpointer(process=True)
    prepared = checkpointer.prepare(state(1))
    pid = spawned.get(timeout=LONG)
    checkpointer.close()
    with pytest.raises(Closed):
        prepared.result(LONG)
    assert not is_there(pid)
    del checkpointer, prepared
    assert open_descriptors() <= before


@pytest.mark.usefixtures("never_ready")
async def test_a_start_that_is_cancelled_again_as_it_cleans_up_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch, spawned: queue.Queue[int]
) -> None:
    """And the process does not die at once, as in an uninterruptible wait of the kernel."""
    before = open_descriptors()
    monkeypatch.setattr(CheckpointProcess, "_send_kill", lambda _: None)
    start = asyncio.create_task(CheckpointProcess.start(Options()))
    pid = await asyncio.to_thread(spawned.get, timeout=LONG)
    for _ in range(2):
        start.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await start
    await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WEXITED)  # it finds the socket closed
    assert open_descriptors() <= before


async def test_one_that_cannot_be_watched_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch, spawned: queue.Queue[int]
) -> None:
    before = open_descriptors()

    def full(*_: object) -> None:
        raise OSError(28, "no more watches")

    monkeypatch.setattr(asyncio.get_running_loop(), "add_reader", full)
    with pytest.raises(WorkerCrashed, match="no more watches"):
        await CheckpointProcess.start(Options())
    await asyncio.to_thread(os.waitid, os.P_PID, spawned.get(), os.WEXITED)
    assert open_descriptors() <= before


@pytest.mark.parametrize("call", ["socketpair", "pidfd_open"])
def test_one_that_no_descriptor_is_left_for_is_no_process(
    monkeypatch: pytest.MonkeyPatch, spawned: queue.Queue[int], call: str
) -> None:
    before, pidfd_open = open_descriptors(), os.pidfd_open

    def full(pid: int = 0) -> int:
        if pid == os.getpid():
            return pidfd_open(pid)
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket if call == "socketpair" else os, call, full)
    with pytest.raises(WorkerCrashed, match=r"could not be started: .*Too many open files; .*\(ulimit -n\)"):
        launch.launch()
    assert [is_there(pid) for pid in spawned.queue] == ([False] if call == "pidfd_open" else [])
    assert open_descriptors() <= before
