"""What comes back is bit by bit what went in: every dtype, shape and stride, in place and new."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from asyncdcp import AsyncCheckpointer
from asyncdcp.format.image import SAFETENSORS_DTYPES
from asyncdcp.metadata import DTYPE_SIZES
from asyncdcp.state_dict.structure import DTYPES

Bits = Callable[[Tensor], Tensor]


def random(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Tensor:
    """Random bits, those of nan and signed zeros too; booleans are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    high = 2 if dtype == "bool" else 256
    raw = torch.randint(0, high, (count * DTYPE_SIZES[dtype],), dtype=torch.uint8, generator=generator)
    return raw.view(DTYPES[dtype]).reshape(shape) if count else torch.empty(shape, dtype=DTYPES[dtype])


def views(dtype: str) -> dict[str, Tensor]:
    made = {
        "plain": random((3, 5), dtype),
        "scalar": random((), dtype, 1),
        "empty": random((0,), dtype),
        "empty_2d": random((4, 0, 2), dtype),
        "transposed": random((4, 7), dtype, 2).t(),
        "strided": random((9, 6), dtype, 3)[::2, 1::3],
        "expanded": random((3, 1), dtype, 4).expand(3, 5),
        "offset": random((40,), dtype, 5)[7:19],
        "one": random((1,), dtype, 6),
    }
    if DTYPES[dtype].is_complex:
        made["conj"] = random((3, 4), dtype, 7).conj()
        made["conj_strided"] = random((6, 4), dtype, 8).conj()[::2].t()
    if dtype in ("float16", "float32", "float64"):
        complex_of = {"float16": "complex32", "float32": "complex64", "float64": "complex128"}[dtype]
        made["negative"] = random((3, 4), complex_of, 9).conj().imag
        made["negative_strided"] = random((6, 4), complex_of, 10).conj().imag[::2].t()
        assert made["negative"].is_neg()
    return made


@pytest.fixture(scope="module")
def lasting() -> Iterator[AsyncCheckpointer]:
    """One for all dtypes."""
    with AsyncCheckpointer() as made:
        yield made


@pytest.mark.parametrize("dtype", list(DTYPE_SIZES))
def test_every_dtype_and_view(lasting: AsyncCheckpointer, tmp_path: Path, bits: Bits, dtype: str) -> None:
    state = views(dtype)
    lasting.save(tmp_path / "it", state).result()
    made = lasting.load(tmp_path / "it").result()
    targets = {name: random(tuple(tensor.shape), dtype, 99) for name, tensor in state.items()}
    lasting.load(tmp_path / "it", targets).result()
    for name, tensor in state.items():
        for loaded in (made[name], targets[name]):
            assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(bits(loaded), bits(tensor)), name


@pytest.mark.parametrize("dtype", ["float32", "bool", "bfloat16", "uint8", "complex64", "float8_e4m3fn"])
def test_targets_may_be_strided_too(lasting: AsyncCheckpointer, tmp_path: Path, bits: Bits, dtype: str) -> None:
    state = {"a": random((6, 4), dtype), "b": random((5,), dtype, 1)}
    targets = {"a": random((4, 12), dtype, 2)[:, ::2].t(), "b": random((5, 3), dtype, 3)[:, 1]}
    lasting.save(tmp_path / "it", state).result()
    assert lasting.load(tmp_path / "it", targets).result() is targets
    for name, tensor in state.items():
        assert torch.equal(bits(targets[name]), bits(tensor))


def test_a_data_file_is_a_safetensors_file(checkpointer: AsyncCheckpointer, tmp_path: Path, bits: Bits) -> None:
    state = {
        f"{dtype}.{name}": tensor
        for dtype in SAFETENSORS_DTYPES
        for name, tensor in views(dtype).items()
        if not dtype.startswith("float8")
    }
    checkpointer.save(tmp_path / "it", state).result()
    [path] = (tmp_path / "it").glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(state)
        for name, tensor in state.items():
            loaded = file.get_tensor(name)
            assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(bits(loaded), bits(tensor)), name


def test_a_thousand_tensors_and_none(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
    many = {f"layer.{number}": torch.full((number % 7, 3), number) for number in range(1000)}
    states: dict[str, dict[str, Any]] = {
        "many": many,
        "none": {},
        "values": {"lr": 0.1, "epochs": [1, 2], "name": "x"},
    }
    for name, state in states.items():
        result = checkpointer.save(tmp_path / name, state).result()
        assert result.tensors == (1000 if name == "many" else 0)
        loaded = checkpointer.load(tmp_path / name).result()
        assert list(loaded) == list(state)
        for key, value in state.items():
            same = torch.equal(loaded[key], value) if isinstance(value, Tensor) else loaded[key] == value
            assert same, key


def test_parameters_and_tensors_that_require_grad(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
    """Small ones are gathered, big ones copied, by different ways."""
    layer = torch.nn.Linear(300, 300)
    state = {"weight": layer.weight, "bias": layer.bias, "product": layer.weight @ layer.weight}
    checkpointer.save(tmp_path / "it", state).result()
    loaded = checkpointer.load(tmp_path / "it").result()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_inference_tensors(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
    with torch.inference_mode():
        state = {"small": torch.arange(10) + 1, "big": torch.arange(100_000) + 1, "t": torch.ones(300, 200).t()}
        checkpointer.save(tmp_path / "it", state).result()
    loaded = checkpointer.load(tmp_path / "it").result()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
