"""The run that the examples on the command line's page show: really trained, really saved, and killed once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from asyncdcp import CheckpointManager
from asyncdcp.runs import KeepLast


class Block(torch.nn.Module):
    """A layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(64)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))


class GPT(torch.nn.Module):
    """The shape of one, with a tied head. Its numbers are the same on every machine: nothing is drawn or multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = torch.nn.Embedding(4096, 64)
        self.h = torch.nn.ModuleList(Block() for _ in range(4))
        self.head = torch.nn.Linear(64, 4096, bias=False)
        self.head.weight = self.wte.weight
        with torch.no_grad():
            for parameter in self.parameters():
                values = torch.arange(parameter.numel(), dtype=torch.float64) % 1009 / 1009 - 0.5
                parameter.copy_(values.reshape(parameter.shape))


def make_run(folder: Path) -> None:
    """Steps 100 to 400, of which three are kept, and a save of step 500 that was cut off."""
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    progress = {"step": 0}
    state = {"model": model, "optimizer": optimizer, "progress": progress}
    losses = {100: 3.25, 200: 2.5, 300: 2.125, 400: 2.0}
    with CheckpointManager(folder, keep=KeepLast(3), process=False) as manager:
        for step, loss in losses.items():
            for parameter in model.parameters():
                parameter.grad = parameter.detach().clone()
            optimizer.step()
            progress["step"] = step
            manager.save(step, state, metrics={"loss": loss}).result()
            manager.wait().result()
    _cut_off(folder)


def _cut_off(folder: Path) -> None:
    """What is left where the machine goes down in the middle of a save, long ago."""
    (folder / "step_500").mkdir()
    (data,) = (folder / "step_400").glob("*.safetensors")
    copy = folder / "step_500" / f"{'0' * 20}-0-0.safetensors"
    shutil.copy(data, copy)
    os.truncate(copy, 1_500_000)
    os.utime(copy, (1.7e9, 1.7e9))
