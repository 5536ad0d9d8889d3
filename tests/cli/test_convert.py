"""``asyncdcp convert`` as a person calls it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import get_args

import pytest
import safetensors.torch
import torch

from asyncdcp import SyncCheckpointer
from asyncdcp.cli.commands.convert import _FORMATS
from asyncdcp.interop.convert import Format
from tests.cli.conftest import Call


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    with SyncCheckpointer(process=False) as checkpointer:
        checkpointer.save(tmp_path / "step", {"model": {"w": torch.arange(6.0), "b": torch.ones(2)}, "epoch": 3})
    return tmp_path / "step"


def test_there_and_back(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    words = ("--to", "hf", "--rename", "model=", "--keys", "model.*", "--dtype", "bfloat16")
    ran = call("convert", checkpoint, tmp_path / "hf", *words)
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == f"written  {tmp_path / 'hf'}  2 tensors, 16 B, 0 values, read again and compared\n"
    found = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(found["w"], torch.arange(6.0).bfloat16())
    back = call("convert", tmp_path / "hf", tmp_path / "native", "--rename", "=model", "--json").json
    assert (back["format"], back["tensors"], back["left_out"]) == ("native", 2, [])
    assert "model.w" in call("inspect", tmp_path / "native", "--json").out


def test_what_is_left_out_is_said(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    assert (
        "left out, since the format holds tensors only: epoch\n"
        in call("convert", checkpoint, tmp_path / "hf", "--to", "hf").out
    )


def test_wrong_words(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    for words, said in (
        ((checkpoint, target, "--to", "onnx"), "'onnx' is not one of"),
        ((checkpoint, target, "--rename", "model"), "--rename takes OLD=NEW, not 'model'"),
        ((checkpoint, target, "--keys", "nothing*"), "keys nothing* match nothing in"),
        ((checkpoint, target, "--dtype", "int3"), "dtype takes one of"),
        ((checkpoint, checkpoint, "--to", "torch"), "exists; choose another name"),
        ((tmp_path / "no", target), "there is no"),
        ((tmp_path, target), "no checkpoint at"),
    ):
        assert said in call("convert", *words).error
    assert not target.exists()


def test_the_program_knows_every_format() -> None:
    assert get_args(Format) == _FORMATS


def test_a_run_in_place_of_a_checkpoint(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    checkpoint.rename(tmp_path / "step_7")
    assert call("convert", tmp_path, tmp_path / "new").error.endswith(f"to list them: asyncdcp ls {tmp_path}")


def test_a_target_that_exists_is_refused_without_talk_of_options_that_are_not_there(
    call: Call, checkpoint: Path
) -> None:
    error = call("convert", checkpoint, checkpoint).error
    assert error == f"{checkpoint} exists; choose another name, or remove it first"


def test_a_path_that_is_not_utf_8(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    odd = checkpoint.rename(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff"))
    escaped = f"{tmp_path}/odd\\udcff"
    assert call("inspect", odd, "--json").json["path"] == escaped
    assert call("verify", odd, "--json").json[0]["path"] == escaped
    assert call("convert", odd, f"{odd}_hf", "--to", "hf", "--json").json["path"] == f"{escaped}_hf"
    assert call("convert", odd, f"{odd}_new").status == 0
    assert call("inspect", f"{odd}_new", "--json").json["metadata"] == {"converted_from": escaped}
