"""Starts the child by exec: a fresh interpreter that finds what the trainer found, and inherits nothing else.

``posix_spawn`` neither copies the trainer's memory map nor runs a line of its code. The interpreter runs isolated
(no ``site``, no ``.pth`` files, no ``sitecustomize``, no user's ``__main__``, none of PYTHON*), and its ``sys.path``
is its own standard library, then the places where this process imported asyncdcp and what it needs from, then the
rest of this process's ``sys.path``. So ``python -c``, zip files and editable installs make no difference.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
from contextlib import ExitStack
from importlib import import_module
from typing import Final, NamedTuple

from asyncdcp.errors import WorkerCrashed, with_way_out
from asyncdcp.worker.protocol import IGNORED

_NEEDED: Final = ("asyncdcp", "msgspec", "anyio", "aiofiles", "xxhash", "zstandard")
_BOOT: Final = "import sys; sys.path += sys.argv[2:]; from asyncdcp.worker.main import main; main()"
_TITLE: Final = "asyncdcp.worker"
_FIRST_FREE_FD: Final = 10  # above those that the child is given, so that no duplicate lands on one


def is_supported() -> bool:
    """Whether this system has what the background process needs: Linux, memfds, and pidfds that may be used."""
    try:
        pidfd = os.pidfd_open(os.getpid())
    except (AttributeError, OSError):
        return False
    os.close(pidfd)
    return sys.platform == "linux" and hasattr(os, "memfd_create")


class Launched(NamedTuple):
    """A child that was started. The descriptors are the caller's to close."""

    pid: int
    pidfd: int
    sock: socket.socket
    stderr: int
    """A memfd that the child writes to until it is ready: what went wrong, if it never is."""

    def close(self) -> None:
        """Closes them; the child finds its trainer gone, and ends."""
        self.sock.close()
        os.close(self.pidfd)
        os.close(self.stderr)


def launch() -> Launched:
    """Starts the child; it has not run yet when this returns. Its session is its own. Raises ``WorkerCrashed``."""
    try:
        with ExitStack() as undo, ExitStack() as on_error:
            ours, theirs = socket.socketpair()
            undo.callback(theirs.close)
            on_error.callback(ours.close)
            stderr = os.memfd_create("asyncdcp-stderr", os.MFD_CLOEXEC)
            on_error.callback(os.close, stderr)
            pid = _spawn(theirs, stderr, undo)
            pidfd = _pidfd_of(pid)
            on_error.pop_all()
            return Launched(pid, pidfd, ours, stderr)
    except OSError as error:
        message = f"the background process could not be started: {error}"
        raise WorkerCrashed(with_way_out(message, error.errno)) from error


def _pidfd_of(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError:  # without one its end could not be seen
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _spawn(sock: socket.socket, stderr: int, undo: ExitStack) -> int:
    trainer = os.pidfd_open(os.getpid())
    undo.callback(os.close, trainer)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    undo.callback(os.close, null)
    given = []
    for target, fd in enumerate((null, null, stderr, sock.fileno(), trainer)):
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_FD)
        undo.callback(os.close, high)
        given.append((os.POSIX_SPAWN_DUP2, high, target))
    return os.posix_spawn(
        sys.executable,
        command(),
        environment(),
        file_actions=given,
        setsid=True,
        setsigmask=IGNORED,
        setsigdef=[number for number in signal.valid_signals() if number not in (signal.SIGKILL, signal.SIGSTOP)],
    )


def command() -> list[str]:
    """The child's command line."""
    if not sys.executable:
        raise WorkerCrashed("the background process could not be started: sys.executable names no interpreter")
    isolated = ["-s", "-P"] if "PYTHONHOME" in os.environ else ["-I"]  # -I would hide PYTHONHOME, which it needs
    return [sys.executable, *isolated, "-S", "-c", _BOOT, _TITLE, *import_places()]


def environment() -> dict[str, str]:
    """The trainer's, but for what would change how the child's interpreter works."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON") or name == "PYTHONHOME"}


def import_places() -> list[str]:
    """Where the child looks for modules after its own standard library."""
    roots = [_root(name) for name in _NEEDED]
    own = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
    return list(dict.fromkeys([*roots, *own]))


def _root(name: str) -> str:
    """The directory (or zip file) that a package was imported from."""
    path = import_module(name).__file__
    assert path is not None
    return os.path.dirname(os.path.dirname(os.path.abspath(path)))
