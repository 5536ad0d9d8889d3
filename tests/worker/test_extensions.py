"""Extensions in the background process: built-in ones, a user's own by import path, and what cannot go there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncdcp import AESGCM, AsyncCheckpointer, BytePlanes, Options, ZStandard
from asyncdcp.errors import InvalidOption, ThreadPipelineWarning
from tests.extensions.samples import PID_FILE, Unmakeable, Xor, Zlib
from tests.worker.conftest import LONG, worker_of

STATE: dict[str, Any] = {"w": torch.arange(3_000_000, dtype=torch.float32), "h": torch.randn(5000).bfloat16(), "n": 3}
KEY = bytes(range(32))


def saved_and_loaded(checkpointer: AsyncCheckpointer, path: Path) -> None:
    result = checkpointer.save(path, STATE).result(LONG)
    data = [file for file in path.iterdir() if re.fullmatch(r".*-0-\d+\..*", file.name)]
    assert result.stored_bytes == sum(file.stat().st_size for file in data)
    loaded = checkpointer.load(path).result(LONG)
    assert all(torch.equal(loaded[name], STATE[name]) for name in "wh") and loaded["n"] == 3


def test_the_worker_runs_them_with_the_trainers_key_and_a_class_of_this_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is given by a callable, which the worker never sees; the class is found there by its import path."""
    note = tmp_path / "pids"
    monkeypatch.setenv(PID_FILE, str(note))
    asked: list[str] = []

    def provider(key_id: str) -> bytes:
        asked.append(key_id)
        return KEY

    extensions = [Xor(3), BytePlanes(), ZStandard(), AESGCM(provider, key_id="mine")]
    with AsyncCheckpointer(process=True, extensions=extensions) as checkpointer:
        saved_and_loaded(checkpointer, tmp_path / "a")
        assert set(note.read_text().split()) == {str(worker_of(checkpointer).pid)}
        inspection = checkpointer._engine.submit(worker_of(checkpointer).inspect).result(LONG)
        assert "torch" not in inspection.modules and "tests.extensions.samples" in inspection.modules
    assert asked == ["mine"]
    assert str(os.getpid()) not in note.read_text().split()


def test_what_cannot_travel_runs_on_a_thread_and_says_so_once(tmp_path: Path) -> None:
    with AsyncCheckpointer(process=True, extensions=[Zlib()]) as checkpointer:
        with pytest.warns(ThreadPipelineWarning, match=r"stream.zlib@tests/1 cannot be made"):
            saved_and_loaded(checkpointer, tmp_path / "a")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: pytest.fail("said twice"))
            checkpointer.save(tmp_path / "b", STATE).result(LONG)


def test_what_cannot_be_made_there_fails_the_save_and_names_it(tmp_path: Path) -> None:
    with AsyncCheckpointer(Options(on_error="warn"), process=True, extensions=[Unmakeable()]) as checkpointer:
        handle = checkpointer.save(tmp_path / "a", STATE)
        with pytest.raises(InvalidOption, match=r"samples.Unmakeable could not be made .*not here.*process=False"):
            handle.result(LONG)
