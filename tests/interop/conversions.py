"""Sources of each format as its own library writes them, and what it reads of a target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from asyncdcp import SyncCheckpointer
from asyncdcp.interop.convert import Format

FORMS: tuple[Format, ...] = ("native", "dcp", "hf", "torch")


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed.weight": torch.randn(300, 40, generator=generator),
        "model.layer.0.weight": torch.randn(7, 5, generator=generator).bfloat16(),
        "model.layer.0.bias": torch.arange(5),
        "model.scale": torch.tensor(3.5, dtype=torch.float64),
        "model.empty": torch.empty(0, 4),
        "mask": torch.tensor([True, False, True]),
    }


def nested() -> dict[str, Any]:
    flat = tensors()
    model = {name.removeprefix("model."): tensor for name, tensor in flat.items() if name.startswith("model.")}
    return {"model": model, "mask": flat["mask"], "epoch": 3, "lr": 0.25, "names": ["a", "b"]}


def write_source(form: str, path: Path) -> Path:
    """The same tensors as the format's own library writes them."""
    if form == "native":
        with SyncCheckpointer(process=False) as checkpointer:
            checkpointer.save(path, nested())
    elif form == "dcp":
        dcp_save(nested(), checkpoint_id=path, no_dist=True)
    elif form == "torch":
        path = path.with_suffix(".pt")
        torch.save(nested(), path)
    else:
        path.mkdir()
        safetensors.torch.save_file(tensors(), path / "model.safetensors")
    return path


def read_back(form: str, path: Path) -> dict[str, Tensor]:
    """As the format's own library reads them, by name."""
    if form == "native":
        with SyncCheckpointer(process=False) as checkpointer:
            return flat_of(checkpointer.load(path))
    if form == "dcp":
        state: dict[str, Any] = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
        dcp_load(state, checkpoint_id=path, no_dist=True)
        return state
    if form == "torch":
        return flat_of(torch.load(path, weights_only=True))
    return {
        name: tensor
        for file in sorted(path.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(file).items()
    }


def flat_of(state: Any, prefix: str = "") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            found[f"{prefix}{key}"] = value
        elif isinstance(value, dict):
            found |= flat_of(value, f"{prefix}{key}.")
    return found


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def everything(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))
