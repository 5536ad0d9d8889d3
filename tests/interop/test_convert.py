"""From each format to each that can be written, bit by bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncdcp import AsyncCheckpointer, SyncCheckpointer
from asyncdcp.interop import streaming
from asyncdcp.interop.convert import Changes, Format, convert
from tests.interop.conversions import FORMS, flat_of, read_back, same, tensors, write_source

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("form", FORMS)
async def test_matrix(tmp_path: Path, form: Format, to: Format) -> None:
    source, target = write_source(form, tmp_path / "source"), tmp_path / "target"
    done = await convert(source, target, to)
    same(read_back(to, target), tensors())
    assert (done.tensors, done.tensor_bytes) == (6, sum(tensor.nbytes for tensor in tensors().values()))
    assert done.left_out == (("epoch", "lr", "names") if to == "hf" and form != "hf" else ())
    assert sorted(os.listdir(tmp_path)) == sorted([source.name, "target"])


@pytest.mark.parametrize("to", ["native", "torch"])
async def test_values_and_containers_are_kept(tmp_path: Path, to: Format) -> None:
    await convert(write_source("native", tmp_path / "source"), tmp_path / "target", to)
    if to == "torch":
        state = torch.load(tmp_path / "target", weights_only=True)
    else:
        async with AsyncCheckpointer(process=False) as checkpointer:
            state = await checkpointer.load(tmp_path / "target")
    assert (state["epoch"], state["lr"], state["names"]) == (3, 0.25, ["a", "b"])


@pytest.mark.parametrize("form", FORMS)
async def test_opened_as_they_are(tmp_path: Path, form: Format) -> None:
    """Without a conversion, in place and anew."""
    source = write_source(form, tmp_path / "source")
    async with AsyncCheckpointer(process=False) as checkpointer:
        same(flat_of(await checkpointer.load(source)), tensors())
        state: dict[str, Any] = {"model.embed.weight": torch.zeros(300, 40), "mask": torch.zeros(3, dtype=torch.bool)}
        await checkpointer.load(source, state, strict=False)
    same(state, {name: tensors()[name] for name in state})


async def test_shards_with_their_index(tmp_path: Path) -> None:
    source = write_source("native", tmp_path / "source")
    await convert(source, tmp_path / "target", "hf", Changes(shard_bytes=100))
    names = sorted(path.name for path in (tmp_path / "target").iterdir())
    assert names[-1] == "model.safetensors.index.json"
    assert names[0].startswith("model-00001-of-0000")
    same(read_back("hf", tmp_path / "target"), tensors())
    await convert(tmp_path / "target", tmp_path / "again", "native")
    same(read_back("native", tmp_path / "again"), tensors())


async def test_keys_rename_and_dtype(tmp_path: Path) -> None:
    source = write_source("native", tmp_path / "source")
    changes = Changes(
        keys=["model.layer.*", "model.embed.*"], rename={"model": "", "model.embed": "wte"}, dtype="float16"
    )
    await convert(source, tmp_path / "target", "hf", changes)
    wanted = tensors()
    same(
        read_back("hf", tmp_path / "target"),
        {
            "layer.0.weight": wanted["model.layer.0.weight"].half(),
            "layer.0.bias": wanted["model.layer.0.bias"],
            "wte.weight": wanted["model.embed.weight"].half(),
        },
    )
    await convert(tmp_path / "target", tmp_path / "native", "native", Changes(rename={"": "model"}))
    assert set(read_back("native", tmp_path / "native")) == {
        "model.layer.0.weight",
        "model.layer.0.bias",
        "model.wte.weight",
    }


@pytest.mark.parametrize("to", FORMS)
async def test_tied_tensors(tmp_path: Path, to: Format) -> None:
    """Under the second name alone, too."""
    weight = torch.arange(12.0).reshape(3, 4)
    with SyncCheckpointer(process=False) as checkpointer:
        checkpointer.save(tmp_path / "source", {"a": weight, "b": weight, "c": torch.ones(2)})
    await convert(tmp_path / "source", tmp_path / "target", to)
    await convert(tmp_path / "source", tmp_path / "part", to, Changes(keys=["b", "c"]))
    with SyncCheckpointer(process=False) as checkpointer:
        assert set(checkpointer.load(tmp_path / "target")) == ({"a", "c"} if to == "hf" else {"a", "b", "c"})
        part = checkpointer.load(tmp_path / "part")
    same(part, {"b": weight, "c": torch.ones(2)})


async def test_several_windows_and_slabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "WINDOW_BYTES", 1 << 20)
    state = {str(number): torch.randn(300_000 + number) for number in range(20)}  # 24 MB: three slabs
    with SyncCheckpointer(process=False) as checkpointer:
        checkpointer.save(tmp_path / "source", state)
    for to in FORMS:
        await convert(tmp_path / "source", tmp_path / to, to)
        with SyncCheckpointer(process=False) as checkpointer:
            same(checkpointer.load(tmp_path / to), state)
