"""The public names: each is explained, and the examples in their docstrings run."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import asyncdcp

_OPTIONS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
_WITHOUT = {
    "AsyncDCPError",  # the table of errors has them all
    "BlockContext",
    "Checkpoint",
    "EverySeconds",
    "Extension",
    "KeepBest",  # with KeepLast
    "KeepEvery",
    "LoadReport",  # what verbs return
    "OnPreemption",  # the README's, which sends a signal
    "Progress",
    "Published",
    "Ranks",
    "SaveResult",
    "SoleRank",
    "TransportOptions",
    "VerifyReport",
    "recover",  # examples/recover.py: it takes ranks
}
"""What has no example of its own."""


def _examples() -> Iterator[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in asyncdcp._HOMES:
        made = getattr(asyncdcp, name)
        found = finder.find(made, name, module=inspect.getmodule(made), globs={"asyncdcp": asyncdcp, "torch": torch})
        yield from (example for example in found if example.examples)


@pytest.mark.parametrize("example", [*_examples()], ids=lambda example: example.name)
def test_examples_run(example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``asyncdcp`` and ``torch`` imported, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ASYNCDCP_KEY", raising=False)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=_OPTIONS).run(example, out=said.append)
    assert not said, "".join(said)


def test_what_an_extra_brings_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> None:
        raise ModuleNotFoundError("No module named 'obstore'")

    monkeypatch.setattr("asyncdcp.storage.import_module", gone)
    with pytest.raises(asyncdcp.errors.MissingDependency, match="object-store"):
        asyncdcp.__getattr__("ObjectStorage")
    monkeypatch.delitem(vars(asyncdcp), "ObjectStorage", raising=False)
    names: dict[str, object] = {}
    exec("from asyncdcp import *", names)  # which takes no extra
    assert names["CheckpointManager"] is asyncdcp.CheckpointManager


def test_what_has_no_example_is_known() -> None:
    named = {example.name.partition(".")[0] for example in _examples()}
    assert named | _WITHOUT == set(asyncdcp._HOMES)
    assert not named & _WITHOUT


def test_each_is_explained() -> None:
    """By itself, or by the port that it fills."""
    ports = {"LocalStorage", "MemoryStorage", "ObjectStorage"}
    unexplained = [
        f"{name}.{verb}"
        for name in asyncdcp._HOMES
        if name not in ports and inspect.isclass(getattr(asyncdcp, name))
        for verb, made in vars(getattr(asyncdcp, name)).items()
        if not verb.startswith("_") and (callable(made) or isinstance(made, (property, classmethod, staticmethod)))
        if not inspect.getdoc(getattr(getattr(asyncdcp, name), verb))
    ]
    assert not unexplained
    assert not [name for name in asyncdcp._HOMES if not inspect.getdoc(getattr(asyncdcp, name))]
