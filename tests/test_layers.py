"""Imports point downward only, siblings leave each other alone, and nothing below the torch line imports torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import asyncdcp

ROOT = Path(asyncdcp.__file__).parent

LEVELS: list[set[str]] = [
    {"errors", "unwinding"},
    {
        "boxes",
        "callbacks",
        "config",
        "memory_limits",
        "metadata",
        "names",
        "slot_ring",
        "threads",
        "trace",
        "warn",
    },
    {"chunk_table", "envelope", "results", "storage", "arena", "futures", "closing"},
    {"stored_chunks", "extensions", "format", "engine"},
    {"planning", "runs"},
    {"pipeline"},
    {"worker"},
    # ── the torch line: nothing above imports torch ──
    {"stateful", "ranks", "train_state"},
    {"state_dict"},
    {"staging"},
    {"checkpointer"},
    {"manager", "transport"},
    {"testing"},
    {"__init__"},
    {"interop"},
    {"cli"},
]
"""Top-level modules and packages of asyncdcp, lowest first. A package is one sibling: inside it imports are its own."""

TORCH_FROM = "stateful"


class Import(NamedTuple):
    """``module`` of part ``part`` (a top-level module or package) imports ``target``, a dotted name."""

    part: str
    module: str
    target: str


def part_of(path: Path) -> str:
    """The top-level module or package that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def dotted(path: Path) -> str:
    """The name by which a file is imported."""
    return ".".join(("asyncdcp", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def level_of(part: str) -> int:
    """Raises AssertionError for a part that is not in the table: give it its place."""
    found = [number for number, parts in enumerate(LEVELS) if part in parts]
    assert len(found) == 1, f"asyncdcp.{part} has to be in LEVELS once"
    return found[0]


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    """Every import statement, those in functions and under TYPE_CHECKING too, and ``import_module`` of a literal."""
    return [
        Import(part_of(path), str(path.relative_to(ROOT)), target)
        for path in sorted(ROOT.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        for target in targets(node, path)
    ]


def targets(node: ast.AST, path: Path) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{path} has a relative import"
        base = node.module or ""
        # `from asyncdcp import x` may mean a module or a public name, which both have a home to be looked up
        for name in (f"{base}.{alias.name}" for alias in node.names):
            yield name if base == "asyncdcp" or (ROOT.parent / f"{name.replace('.', '/')}.py").exists() else base
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))


def target_part(target: str) -> str | None:
    """The part of asyncdcp that is imported; None for other packages."""
    names = target.split(".")
    if names[0] != "asyncdcp":
        return None
    if len(names) == 1:
        return "__init__"
    return asyncdcp._HOMES.get(names[1], names[1])


def test_every_module_has_a_level() -> None:
    parts = {part_of(path) for path in ROOT.rglob("*.py")}
    for part in sorted(parts):
        level_of(part)
    assert set().union(*LEVELS) == parts, "the table names what does not exist"


def test_imports_point_downward(imports: list[Import]) -> None:
    wrong = [
        f"{module} imports {target}"
        for part, module, target in imports
        if (other := target_part(target)) is not None and other != part and level_of(other) >= level_of(part)
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle(imports: list[Import]) -> None:
    """Within a part, too, and not for types alone."""
    graph: dict[str, set[str]] = {}
    for _, module, target in imports:
        graph.setdefault(dotted(ROOT / module), set()).add(target)
    TopologicalSorter(graph).prepare()


def test_no_module_below_the_torch_line_imports_torch(imports: list[Import]) -> None:
    wrong = [
        f"{module} imports {target}"
        for part, module, target in imports
        if target.split(".")[0] == "torch" and level_of(part) < level_of(TORCH_FROM)
    ]
    assert wrong == []
    assert any(target == "torch" for _, _, target in imports), "the test sees no imports"


def test_importing_all_below_the_line_leaves_torch_out() -> None:
    """Dynamically too: no library that they use brings it along."""
    below = [
        dotted(path)
        for path in sorted(ROOT.rglob("*.py"))
        if path.name != "__main__.py" and part_of(path) != "__init__" and level_of(part_of(path)) < level_of(TORCH_FROM)
    ]
    assert len(below) > 20
    code = f"""
import importlib, sys
for name in {below!r}:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
    assert "numpy" not in sys.modules, name
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
