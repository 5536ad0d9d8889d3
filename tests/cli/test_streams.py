"""The program as a process: what it imports, and what pipes, terminals and signals do to it."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from pathlib import Path

import pytest

from asyncdcp.cli.main import COMMANDS, main, program
from asyncdcp.errors import VolatileStorageWarning
from tests.cli.conftest import Call
from tests.work import LONG

_PROGRAM = [sys.executable, "-m", "asyncdcp.cli"]
_ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(  # type: ignore[call-overload]  # options of a test's choosing
        [*_PROGRAM, *map(str, arguments)],
        env=_ENVIRONMENT,
        text=True,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        **{"stdout": subprocess.PIPE, **options},
    )


def test_no_command_imports_torch() -> None:
    """Nor numpy, as long as no tensor is read."""
    code = f"""
import sys
from importlib import import_module
import asyncdcp.cli.main
assert "msgspec._json" not in sys.modules and "anyio" not in sys.modules, "--help imports more than it needs"
for name in {list(COMMANDS)}:
    import_module("asyncdcp.cli.commands." + name)
    assert "torch" not in sys.modules, name
    assert "numpy" not in sys.modules, name
import asyncdcp.cli.statistics, asyncdcp.cli.moves
assert "torch" not in sys.modules
"""
    ran = subprocess.run([sys.executable, "-c", code], env=_ENVIRONMENT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_reader_that_goes_away_ends_it_quietly(run: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with start("inspect", run / "step_10", stdout=writing) as child:
        os.close(writing)
        _, err = child.communicate(timeout=LONG)
    assert (child.returncode, err) == (141, "")


def test_a_full_disk_is_a_line(run: Path) -> None:
    with open("/dev/full", "w") as full, start("inspect", run / "step_10", stdout=full) as child:
        _, err = child.communicate(timeout=LONG)
    assert (child.returncode, err) == (2, "asyncdcp: No space left on device\n")


def test_an_output_that_is_closed(run: Path) -> None:
    words = [*_PROGRAM, "inspect", str(run / "step_10")]
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *words]
    ran = subprocess.run(closed, env=_ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_terminal_without_unicode(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_ENVIRONMENT, "PYTHONIOENCODING", "latin-1")
    with start("inspect", run / "step_10") as child:
        out, err = child.communicate(timeout=LONG)
    assert (child.returncode, err) == (0, "") and "\\u2500 embed.weight" in out


def test_ctrl_c(tmp_path: Path) -> None:
    """While it waits for a storage that never answers."""
    code = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
from asyncdcp.cli import opening
from asyncdcp.cli.main import main
import anyio

async def stuck(*_, **__):
    print("waiting", flush=True)
    await anyio.sleep_forever()

opening.formats.open_checkpoint = stuck
sys.exit(main(["inspect", sys.argv[1]]))
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        env=_ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "waiting\n"
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=LONG)
        finally:
            child.kill()
    assert (child.returncode, err) == (130, "\nasyncdcp: interrupted\n")


def on_terminal(*arguments: object, columns: int, **environment: str) -> str:
    """What a command prints on a terminal so wide."""
    leader, follower = pty.openpty()
    env = {**_ENVIRONMENT, "TERM": "xterm-256color", "COLUMNS": str(columns), **environment}
    child = subprocess.Popen([*_PROGRAM, *map(str, arguments)], env=env, stdout=follower, stderr=follower)
    os.close(follower)
    out = b""
    deadline = time.monotonic() + LONG
    while time.monotonic() < deadline and select.select([leader], [], [], LONG)[0]:
        try:
            data = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        out += data
    assert child.wait(LONG) == 0, out
    os.close(leader)
    return out.decode()


def test_a_narrow_terminal_and_its_colours(run: Path) -> None:
    coloured = on_terminal("ls", run, columns=200)
    assert "\x1b[32mcommitted" in coloured
    narrow = on_terminal("inspect", run / "step_10", columns=60, NO_COLOR="1")
    assert "\x1b" not in narrow
    table = narrow.split("NAME")[1]
    assert max(map(len, table.splitlines())) <= 60 and "…" in table


# ── in this process ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_installed_program_is_this_one() -> None:
    scripts = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"asyncdcp": f"{main.__module__}:{main.__name__}"}


def test_our_warnings_are_lines_and_others_are_nothing(
    call: Call, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(_: object) -> list[object]:
        warnings.warn("for\nprogrammers", UserWarning, stacklevel=1)
        warnings.warn("for\npeople", VolatileStorageWarning, stacklevel=1)
        return []

    monkeypatch.setattr("asyncdcp.cli.commands.inspect.entries_of", warn)
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        shown = warnings.showwarning
        assert call("inspect", checkpoint).err == "asyncdcp: for people\n"
        assert warnings.showwarning is shown
    assert warnings.showwarning is before


def test_help_has_every_command(call: Call) -> None:
    out = call("--help").out
    for name, text in COMMANDS.items():
        assert f"  {name}" in out and text in " ".join(out.split())
        assert call(name, "--help").out.startswith(f"Usage: asyncdcp {name} ")
    assert call().status == 2 and call("--version").out.startswith("asyncdcp 0.")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(call: Call, shell: str) -> None:
    out = call("completion", shell).out
    assert "_ASYNCDCP_COMPLETE" in out and "asyncdcp" in out


def _completed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: str) -> list[str]:
    monkeypatch.setenv("COMP_WORDS", " ".join(("asyncdcp", *words)))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    monkeypatch.setenv("_ASYNCDCP_COMPLETE", "bash_complete")
    with pytest.raises(SystemExit):
        program.main([], prog_name="asyncdcp", complete_var="_ASYNCDCP_COMPLETE")
    return [line.split(",", 1)[1] for line in capfd.readouterr().out.splitlines() if line]


def test_completion(run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert _completed(monkeypatch, capfd, "in") == ["inspect"]
    found = _completed(monkeypatch, capfd, "cat", str(run / "step_10"), "model.head")
    assert sorted(found) == ["model.head.bias", "model.head.weight"]
    assert _completed(monkeypatch, capfd, "cat", str(run / "nothing"), "m") == []
    assert "--json" in _completed(monkeypatch, capfd, "ls", "--j")
