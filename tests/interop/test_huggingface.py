"""Safetensors files as others write them: what is opened, and what is told of what cannot be."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncdcp import SyncCheckpointer
from asyncdcp.errors import AsyncDCPError, CheckpointNotFound, CorruptCheckpoint, UnsupportedFormat
from asyncdcp.interop.convert import convert
from asyncdcp.interop.huggingface import parse_header


def load(path: Path) -> Any:
    with SyncCheckpointer(process=False) as checkpointer:
        return checkpointer.load(path)


def write(path: Path, header: dict[str, Any] | bytes, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_every_dtype_of_the_library(tmp_path: Path) -> None:
    kinds = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16]
    kinds += [torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32]
    state = {str(kind): torch.arange(4).to(kind) for kind in kinds}
    safetensors.torch.save_file(state, tmp_path / "any name.safetensors")
    found = load(tmp_path / "any name.safetensors")
    assert list(found) == sorted(state, key=list(found).index)
    assert all(torch.equal(found[name].view(torch.uint8), state[name].view(torch.uint8)) for name in state)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "adapter_model.safetensors", "diffusion_pytorch_model.safetensors"]
)
def test_a_directory_is_known_by_its_file(tmp_path: Path, name: str) -> None:
    safetensors.torch.save_file({"w": torch.ones(3)}, tmp_path / name)
    assert torch.equal(load(tmp_path)["w"], torch.ones(3))


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    """Such as what a save of our own left that was never committed."""
    safetensors.torch.save_file({"w": torch.ones(3)}, tmp_path / "0123456789abcdef0123-0-0.safetensors")
    with pytest.raises(CheckpointNotFound):
        load(tmp_path)


def test_an_index_is_not_trusted(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for weight_map, said in (
        ({"w": "b.safetensors"}, "not there"),
        ({"w": "../a.safetensors"}, "not there"),
        ({"v": "a.safetensors"}, "lacks v"),
        ([], "is no index"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CorruptCheckpoint, match=said):
            load(tmp_path)
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"w": "a.safetensors"}}))
    assert torch.equal(load(tmp_path)["w"], torch.ones(3))


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), begin: int = 0, end: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"w": entry()}, 7, "has 7 bytes of data"),
        ({"w": entry()}, 9, "has 9 bytes of data"),
        ({"w": entry(end=4)}, 4, "cannot be"),
        ({"w": entry(begin=8, end=16)}, 16, "cannot be"),
        ({"w": entry(), "v": entry(begin=4, end=12)}, 12, "cannot be"),
        ({"w": entry(shape=(-2,))}, 8, "cannot be"),
        ({"w": entry(shape=(1 << 40, 1 << 40))}, 8, "cannot be"),
        ({"w": entry(shape=(1,) * 65)}, 4, "cannot be"),
        ({"w": {"dtype": "F32"}}, 0, "no safetensors file"),
        (b"not json", 0, "no safetensors file"),
        (b"[" * 100_000, 0, "no safetensors file"),
    ],
)
def test_a_header_is_not_trusted(tmp_path: Path, header: Any, data: int, said: str) -> None:
    path = write(tmp_path / "w.safetensors", header, bytes(data))
    with pytest.raises(CorruptCheckpoint, match=said):
        load(path)


def test_unknown_dtypes_and_short_files(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormat, match="dtype F7"):
        load(write(tmp_path / "w.safetensors", {"w": entry("F7")}, bytes(8)))
    for content in (b"", b"1234", struct.pack("<Q", 1 << 60) + b"{}"):
        (tmp_path / "w.safetensors").write_bytes(content)
        with pytest.raises(CorruptCheckpoint, match="safetensors file"):
            load(tmp_path / "w.safetensors")


@given(st.binary(max_size=200), st.integers(0, 1000))
def test_any_header_is_answered(text: bytes, data: int) -> None:
    try:
        held = parse_header(text, data, "file")
    except AsyncDCPError:
        return
    assert sum(tensor.length for tensor in held) == data


async def test_transformers_opens_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    with SyncCheckpointer(process=False) as checkpointer:
        checkpointer.save(tmp_path / "step", {"model": model})
    from asyncdcp.interop.convert import Changes

    await convert(tmp_path / "step", tmp_path / "hf", "hf", Changes(rename={"model": ""}, shard_bytes=10_000))
    config.save_pretrained(tmp_path / "hf")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    wanted = model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())
