"""States to measure with: what a trainer of a GPT-2 with Adam holds, filled with random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """The sizes of a GPT-2: width, layers, tokens in its vocabulary, positions."""

    width: int
    layers: int
    vocabulary: int
    positions: int


SHAPES: Final = {
    "gpt2": Shape(768, 12, 50257, 1024),  # GPT-2 small: 124 million parameters, with Adam 1.49 GB
    "small": Shape(384, 6, 5000, 256),  # the same layout, 0.15 GB
    "tiny": Shape(32, 2, 100, 16),  # 0.4 MB: shows that the programs work, and nothing else
}


def gpt2_adam(shape: Shape) -> dict[str, Any]:
    """``{"model": …, "optimizer": …, "step": …}`` in float32 as the ``state_dict()`` methods give them."""
    model = {name: _random(size) for name, size in _parameters(shape)}
    moments = {
        number: {
            "step": torch.tensor(1000.0),
            "exp_avg": _random(tuple(parameter.shape)),
            "exp_avg_sq": _random(tuple(parameter.shape)),
        }
        for number, parameter in enumerate(model.values())
    }
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "params": list(moments)}]
    return {"model": model, "optimizer": {"state": moments, "param_groups": groups}, "step": 1000}


def many_small(count: int, elements: int = 256) -> dict[str, Tensor]:
    """``count`` tensors of 1 KiB, unless ``elements`` says otherwise, each with its own memory."""
    return {f"layer.{number}.weight": _random((elements,)) for number in range(count)}


def tensors_of(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dicts, by their joined keys."""
    if isinstance(state, Tensor):
        return {prefix: state}
    if not isinstance(state, dict):
        return {}
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        found |= tensors_of(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def bytes_of(state: Any) -> int:
    """How many bytes the tensors of a state hold."""
    return sum(tensor.nbytes for tensor in tensors_of(state).values())


def _random(size: tuple[int, ...]) -> Tensor:
    return torch.empty(size).uniform_(-1, 1)


def _parameters(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = shape.width
    yield "transformer.wte.weight", (shape.vocabulary, width)
    yield "transformer.wpe.weight", (shape.positions, width)
    for layer in range(shape.layers):
        block = f"transformer.h.{layer}"
        for name in ("ln_1", "ln_2"):
            yield f"{block}.{name}.weight", (width,)
            yield f"{block}.{name}.bias", (width,)
        for name, rows, columns in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            yield f"{block}.{name}.weight", (rows, columns)
            yield f"{block}.{name}.bias", (columns,)
    yield "transformer.ln_f.weight", (width,)
    yield "transformer.ln_f.bias", (width,)
