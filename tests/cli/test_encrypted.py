"""Compressed and encrypted checkpoints at the command line: with the key, with another one, and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from asyncdcp import AESGCM, BytePlanes, CheckpointManager, ZStandard
from asyncdcp.extensions.aesgcm import key_name
from tests.cli.conftest import Call

KEY, OTHER = bytes(range(32)), bytes(32)
_UNSET = f"the key '{key_name(KEY)}', and the environment variable ASYNCDCP_KEY is not set"
_LACKS = f"the key '{key_name(KEY)}', and the environment variable ASYNCDCP_KEY does not hold it"


@pytest.fixture(scope="module", params=["compressed", "encrypted", "hidden"])
def _saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / str(request.param)
    last = {"encrypted": [AESGCM(KEY)], "hidden": [AESGCM(KEY, hide_metadata=True)]}.get(request.param, [])
    extensions: list[Any] = [BytePlanes(), ZStandard(), *last]
    with CheckpointManager(folder, process=False, extensions=extensions, takeover_seconds=0.0) as manager:
        for step in (1, 2):
            state = {"weight": torch.full((64,), float(step)), "progress": {"step": step}}
            manager.save(step, state, metrics={"loss": 1 / step}).result()
    return folder


@pytest.fixture
def kind(_saved: Path) -> str:
    return _saved.name


@pytest.fixture
def run(_saved: Path) -> Path:
    """Two steps, which nobody changes."""
    return _saved


def commands(run: Path, tmp_path: Path) -> dict[str, tuple[Any, ...]]:
    """Every command: first those that read Records alone, then those that read what describes data, then data."""
    one, two = run / "step_1", run / "step_2"
    return {
        "ls": ("ls", run),
        "history": ("history", run),
        "gc": ("gc", run, "--older-than", 0, "--off-line"),
        "report": ("report", run, "-o", tmp_path / "report.html"),
        "inspect": ("inspect", two),
        "verify": ("verify", two),
        "diff": ("diff", one, two),
        "statistics": ("inspect", two, "--tensor", "*"),
        "diff --values": ("diff", one, two, "--values"),
        "cat": ("cat", two, "weight"),
        "convert": ("convert", two, tmp_path / "out"),
    }


OF_RUNS = {"ls", "history", "gc", "report"}
OF_DESCRIPTIONS = {"inspect", "verify", "diff"}


def test_with_the_key(call: Call, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCDCP_KEY", f"{OTHER.hex()},{KEY.hex()}")
    ran = {name: call(*command) for name, command in commands(run, tmp_path).items()}
    assert {name: done.err for name, done in ran.items() if done.err} == {}
    assert {name for name, done in ran.items() if done.status} == {"diff", "diff --values"}
    assert ran["ls"].out.count("committed") == 2 and "the latest is step 2" in ran["ls"].out
    assert "loss" in ran["history"].out and "encrypted" not in ran["history"].out
    assert ran["cat"].out.startswith("weight  float32 [64]\n[2. 2. ")
    assert ran["verify"].out.startswith("whole")
    assert "progress.step  1 → 2" in ran["diff"].out and "values: 0 of 1 tensor the same" in ran["diff --values"].out


@pytest.mark.parametrize("key", [None, OTHER], ids=["none", "another"])
def test_without_it(
    call: Call, run: Path, kind: str, key: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ASYNCDCP_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("ASYNCDCP_KEY", key.hex())
    all_commands = commands(run, tmp_path)
    works = {"hidden": OF_RUNS, "encrypted": OF_RUNS | OF_DESCRIPTIONS, "compressed": {*all_commands}}[kind]
    for name, command in all_commands.items():
        ran = call(*command)
        if name in works:
            assert (ran.status, ran.err) == (1 if name.startswith("diff") else 0, ""), name
        else:
            assert (_UNSET if key is None else _LACKS) in ran.error, name
    note = "2 encrypted saves cannot be opened (another key than in ASYNCDCP_KEY, or damaged)\n"
    assert (call("history", run).out == note) == (kind == "hidden")
    assert (tmp_path / "out").exists() == ("convert" in works)


def test_a_listing_names_the_key(call: Call, run: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASYNCDCP_KEY", raising=False)
    listed = call("ls", run, "--json").json
    if kind != "hidden":
        assert [(each["state"], each["latest"]) for each in listed] == [("committed", False), ("committed", True)]
        return
    assert [(each["state"], each["latest"]) for each in listed] == [("encrypted", False)] * 2
    assert all(_UNSET in each["cause"] for each in listed)
    table = call("ls", run).out
    assert table.count(_UNSET) == 1 and "encrypted (1, 2): the data is encrypted with the key" in table
    assert call("gc", run, "--older-than", 0, "--off-line", "--delete").out.startswith("nothing to delete")


def test_a_key_that_is_none(call: Call, run: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCDCP_KEY", "secret123")
    for command in (("ls", run), ("inspect", run / "step_1"), ("verify", run / "step_1")):
        ran = call(*command)
        if kind == "compressed":
            assert ran.status == 0
        else:
            assert ran.error.endswith("ASYNCDCP_KEY takes a key of 32 bytes, written in hex or base64")
            assert "secret123" not in ran.err
