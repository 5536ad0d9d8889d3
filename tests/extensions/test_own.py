"""The extension on the page, as a package of somebody else's: tested by the kit, found as an entry point, missed."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncdcp.extensions
from asyncdcp import SyncCheckpointer
from asyncdcp.cli.main import main
from asyncdcp.extensions.registry import ENTRY_POINTS
from asyncdcp.testing.extensions import EXTENSION_CHECKS, Check, ExtensionKit

_PAGE = (Path(asyncdcp.extensions.__file__).parent / "README.md").read_text(encoding="utf-8")
_BLOCKS = {
    kind: str(block) for kind, block in re.findall(r"^```(python|toml)\n(.*?)^```$", _PAGE, re.MULTILINE | re.DOTALL)
}
((_NAME, _VALUE),) = tomllib.loads(_BLOCKS["toml"])["project"]["entry-points"][ENTRY_POINTS].items()
_MODULE = _VALUE.partition(":")[0]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page's class, in a module that can be imported."""
    (tmp_path / f"{_MODULE}.py").write_text(_BLOCKS["python"].partition("\n\n\nwith ")[0])
    monkeypatch.syspath_prepend(tmp_path)
    yield import_module(_MODULE)
    del sys.modules[_MODULE]


@pytest.mark.parametrize("check", EXTENSION_CHECKS, ids=lambda check: check.__name__)
def test_the_kit_passes_it(package: Any, check: Check) -> None:
    check(ExtensionKit(package.Deflate))


def test_with_it_and_without(
    package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "saved")
    with SyncCheckpointer(process=False, extensions=[package.Deflate()]) as checkpointer:
        checkpointer.save(path, {"weight": torch.arange(3.0)})

    reads_tensors, reads_none = ("cat", path, "weight"), [("inspect", path), ("verify", path), ("diff", path, path)]
    assert [main(command) for command in reads_none] == [0, 0, 0]
    assert main(reads_tensors) == 2
    assert f"by {_NAME}/1, which is not known here; install the package" in capsys.readouterr().err

    points = EntryPoints([EntryPoint(_NAME, _VALUE, ENTRY_POINTS)])
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **wanted: points.select(**wanted))
    assert main(reads_tensors) == 0
    assert "[0. 1. 2.]" in capsys.readouterr().out
