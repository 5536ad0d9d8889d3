"""The package's face: what it exports, what importing it costs, and that its types are seen from outside."""

from __future__ import annotations

import os
import subprocess
import sys
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
    assert set(asyncdcp.__all__) == set(asyncdcp._HOMES)
    assert set(asyncdcp.__all__) <= set(dir(asyncdcp))
    for name, home in asyncdcp._HOMES.items():
        assert getattr(asyncdcp, name) is getattr(import_module(f"asyncdcp.{home}"), name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'save_state_dict'"):
        _ = asyncdcp.save_state_dict


PROGRAM = """
import torch
import asyncdcp

async def main() -> None:
    async with asyncdcp.AsyncCheckpointer(asyncdcp.Options(staging_bytes=1 << 28)) as checkpointer:
        handle = checkpointer.save("it", {"w": torch.ones(1)}, metadata={"loss": 0.5})
        reveal_type(await handle)
        reveal_type(await handle.staged)
        staged, committed = handle
        state = {"w": torch.zeros(1)}
        reveal_type(await checkpointer.load("it", state))
        reveal_type(checkpointer.load("it").result())
        reveal_type(handle.result().durable_seconds)
        checkpointer.save("it", {}, overwright=True)
"""

NOT_FOLLOWED = ",".join(f"{name}.*" for name in ("torch", "numpy", "anyio", "trio", "msgspec", "aiofiles", "zstandard"))


def test_a_users_program_sees_the_types(tmp_path: Path) -> None:
    """By py.typed: mypy would skip the package else. What it needs is not followed: torch alone would take a minute."""
    assert (Path(asyncdcp.__file__).parent / "py.typed").exists()
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\n[mypy-{NOT_FOLLOWED}]\nfollow_imports = skip\nignore_missing_imports = True\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "program.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(Path(asyncdcp.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    revealed = [line.split('"')[1] for line in ran.stdout.splitlines() if "Revealed type" in line]
    assert revealed == [
        "asyncdcp.results.SaveResult",
        "None",
        "dict[str, Any]",
        "Any",
        "float",
    ], ran.stdout
    assert 'Unexpected keyword argument "overwright"' in ran.stdout
    errors = [line for line in ran.stdout.splitlines() if line.startswith("program.py") and "error:" in line]
    assert len(errors) == 1, ran.stdout  # those of asyncdcp's own files are of what was not followed
