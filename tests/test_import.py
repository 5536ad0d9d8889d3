"""The package's face: what it exports, what importing it costs, and that its types are seen from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import asyncdcp


def python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_importing_the_package_imports_no_torch() -> None:
    assert python("import sys, asyncdcp; print([n for n in sys.modules if n.split('.')[0] == 'torch'])") == "[]\n"


def test_names_below_the_torch_line_come_without_torch() -> None:
    code = "import sys; from asyncdcp import {}; print('torch' in sys.modules)"
    for name in ("Options", "AsyncDCPError", "LocalStorage", "MemoryStorage", "SaveResult", "CheckpointFuture"):
        assert python(code.format(name)) == "False\n", name


def test_every_public_name_is_there_and_at_home() -> None:
    assert sorted(asyncdcp.__all__) == asyncdcp.__all__
    assert {*asyncdcp.__all__, "ObjectStorage"} == set(asyncdcp._HOMES) <= set(dir(asyncdcp))
    for name, home in asyncdcp._HOMES.items():
        assert getattr(asyncdcp, name) is getattr(import_module(f"asyncdcp.{home}"), name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'save_state_dict'"):
        _ = asyncdcp.save_state_dict


PROGRAM = """
import torch
import asyncdcp

def progressed(progress: asyncdcp.Progress) -> None:
    reveal_type(progress.done)

async def main() -> None:
    state = {"w": torch.zeros(1)}
    async with asyncdcp.AsyncCheckpointer(asyncdcp.Options(staging_bytes=1 << 28)) as checkpointer:
        handle = checkpointer.save("it", state, metadata={"loss": 0.5}, on_progress=progressed)
        reveal_type(await handle)
        reveal_type(await handle.staged)
        staged, committed = handle
        reveal_type(await checkpointer.load("it", state))
        reveal_type(checkpointer.load("it").result())
        reveal_type(handle.result().durable_seconds)
        checkpointer.save("it", {}, overwright=True)
    with asyncdcp.SyncCheckpointer(extensions=[asyncdcp.ZStandard()]) as blocking:
        reveal_type(blocking.save("it", state))
        reveal_type(blocking.load("it", state))
        reveal_type(blocking.load("it"))
        reveal_type(blocking.verify("it").ok)
    keep = asyncdcp.KeepLast(3) | asyncdcp.KeepEvery(100) & asyncdcp.KeepBest("loss")
    async with asyncdcp.CheckpointManager("run", keep=keep, save_when=lambda moment: moment.step > 3) as manager:
        reveal_type(await manager.restore_latest(state))
        reveal_type(await manager.restore(3, state))
        reveal_type(await manager.load(3, state))
        reveal_type(await manager.load(3))
        reveal_type(await manager.steps())
    async for published in asyncdcp.follow("run"):
        reveal_type(await published.load(state))
        reveal_type(published.checkpoint.metrics)

class Own(asyncdcp.BlockExtension):
    def encode(self, data: memoryview, context: asyncdcp.BlockContext) -> bytes:
        reveal_type(context.limit)
        return bytes(data)
"""
REVEALED = """int
asyncdcp.results.SaveResult
None
dict[str, Any]
Any
float
asyncdcp.results.SaveResult
dict[str, Any]
Any
bool
asyncdcp.runs.listing.Checkpoint | None
asyncdcp.runs.listing.Checkpoint
dict[str, Any]
Any
list[int]
dict[str, Any]
dict[str, float | None]
int"""
"""In their order. A tensor is Any here, since torch is not followed: that alone would take a minute."""

NOT_FOLLOWED = ",".join(f"{name}.*" for name in ("torch", "numpy", "anyio", "trio", "msgspec", "aiofiles", "zstandard"))


def test_a_users_program_sees_the_types(tmp_path: Path) -> None:
    """All of them, strictly, and no more is wrong than a word that no verb has."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\n[mypy-{NOT_FOLLOWED}]\nfollow_imports = skip\nignore_missing_imports = True\n"
        "[mypy-asyncdcp.*]\nignore_errors = True\n"  # as of an installed package
    )
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "program.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(Path(asyncdcp.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    revealed = [line.split('"')[1] for line in ran.stdout.splitlines() if "Revealed type" in line]
    assert revealed == REVEALED.splitlines(), ran.stdout
    errors = [line for line in ran.stdout.splitlines() if "error:" in line]
    assert len(errors) == 1 and 'Unexpected keyword argument "overwright"' in errors[0], ran.stdout


def test_the_package_says_that_it_is_typed() -> None:
    """Or mypy would skip it where it is installed."""
    root = Path(asyncdcp.__file__).parent
    assert (root / "py.typed").exists()
    settings = tomllib.loads((root.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["setuptools"]["package-data"]["asyncdcp"] == ["py.typed"]
