"""Programs in processes of their own that start at once: forked from one that has imported torch and asyncdcp, and has
done nothing else. An interpreter takes two seconds of CPU to come so far.

``python -m tests.programs FD`` is that process. For each program it forks a keeper, and that the program; the keeper
says how the program ended. The program is its process's ``__main__`` and ends as any interpreter does: ``atexit``,
threads, finalization.
"""

from __future__ import annotations

import builtins
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Final

_ROOT: Final = Path(__file__).parents[1]
_LIMIT: Final = 1 << 20


class Program:
    """A program that runs. ``pid`` is its process."""

    def __init__(self, args: list[str], keeper: socket.socket, files: tuple[IO[bytes], IO[bytes]]) -> None:
        self._args = args
        self._keeper = keeper
        self._files = files
        self.pid = int(keeper.recv(32))

    def wait(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """How it ended, and all that it said. Kills it if it takes longer, and raises TimeoutExpired."""
        self._keeper.settimeout(timeout)
        try:
            code = int(self._keeper.recv(32))
        except TimeoutError:
            self.kill()
            raise subprocess.TimeoutExpired(self._args, timeout, *map(_content, self._files)) from None
        finally:
            self._keeper.close()
        out, error = (_content(file).decode() for file in self._files)
        return subprocess.CompletedProcess(self._args, code, out, error)

    def kill(self) -> None:
        """By SIGKILL; nothing happens if it has ended. Not to be called after ``wait``."""
        os.kill(self.pid, signal.SIGKILL)


class Programs:
    """The process that programs are forked from."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tests.programs", str(theirs.fileno())]
            path = os.pathsep.join([str(_ROOT), *sys.path])
            environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)

    def start(
        self, *args: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, strict: Sequence[str] = ()
    ) -> Program:
        """Starts ``python *args``: a file with its arguments, or ``-c`` with code. ``env`` is added to the environment;
        ``strict`` are names of warnings that are errors (``-W error::NAME``).
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  # ``wait`` closes them
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        order = {"args": args, "cwd": str(cwd or Path.cwd()), "env": environment, "strict": strict}
        with theirs:
            given = [theirs.fileno(), *(file.fileno() for file in files)]
            socket.send_fds(self._socket, [json.dumps(order).encode()], given)
        return Program([sys.executable, *args], ours, files)

    def run(self, *args: str, timeout: float = 150, **options: Any) -> subprocess.CompletedProcess[str]:
        """``start`` and ``wait``."""
        return self.start(*args, **options).wait(timeout)

    def close(self) -> None:
        """Ends it."""
        self._socket.close()
        self._process.wait(60)


def _content(file: IO[bytes]) -> bytes:
    with file:
        file.seek(0)
        return file.read()


# ── in the process that is forked ──


def serve(control: socket.socket) -> dict[str, Any]:
    """Forks programs by order; returns only in them, with their order. Ends the process when there is no more to do."""
    while True:
        message, fds, _, _ = socket.recv_fds(control, _LIMIT, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            control.close()
            if _keep(*fds):
                return dict(json.loads(message))
        for fd in fds:
            os.close(fd)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass


def _keep(keeper: int, out: int, error: int) -> bool:
    """Forks the program, where this returns. The keeper says its number, and its exit code when it has ended."""
    with socket.socket(fileno=keeper) as says:
        program = os.fork()
        if program:
            says.send(b"%d" % program)
            ended = os.waitid(os.P_PID, program, os.WEXITED | os.WNOWAIT)
            assert ended is not None
            code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            with suppress(OSError):  # whoever started it may be gone
                says.send(b"%d" % code)
                says.recv(1)  # until then the number stays the program's
            os._exit(0)
    for target, fd in enumerate((os.open(os.devnull, os.O_RDONLY), out, error)):
        os.dup2(fd, target)
        os.close(fd)
    return True


def become(args: list[str], cwd: str, env: dict[str, str], strict: list[str]) -> None:
    """Is the program, until its end."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for name in strict:
        warnings.simplefilter("error", getattr(builtins, name))
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    if args[0] == "-c":
        _, code, *rest = args
        sys.argv, sys.path[0] = ["-c", *rest], ""
        exec(compile(code, "<string>", "exec"), main.__dict__)
    else:
        file = Path(args[0])
        main.__file__ = args[0]
        sys.argv, sys.path[0] = args, str(file.parent)
        exec(compile(file.read_bytes(), args[0], "exec"), main.__dict__)


def main() -> None:
    for name in ("torch", "torch.distributed", "asyncdcp.checkpointer", "asyncdcp.manager", "asyncdcp.worker.pipeline"):
        import_module(name)  # what all of them would import
    order = serve(socket.socket(fileno=int(sys.argv[1])))
    become(**order)


if __name__ == "__main__":
    main()
